"""python -m esolm_jax.train --config=FILE --workdir=DIR: trains, or resumes the run in DIR."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import sys

import jax

import esolm_jax
from esolm_jax import cli, memory_limit, results
from esolm_jax import config as config_lib
from esolm_jax.aot import lower_bound
from esolm_jax.data.manifest import Manifest, load_data
from esolm_jax.data.reader import TrainReader, unigram_perplexity
from esolm_jax.errors import UserError
from esolm_jax.evaluation import metrics as eval_metrics
from esolm_jax.evaluation import provenance
from esolm_jax.evaluation.batches import eval_batches
from esolm_jax.files import workdir_lock
from esolm_jax.model import build, finite
from esolm_jax.parallel import distributed, multihost, sharding
from esolm_jax.parallel.stop_signal import StopSignal
from esolm_jax.process import jax_settings, prng
from esolm_jax.training import (
    checkpoint,
    checkpoint_steps,
    health,
    profiling,
    restore,
    speed,
    time_limit,
    train_step,
)
from esolm_jax.training import metrics as metrics_lib
from esolm_jax.training.train_state import TrainState


class Run:
    """A training run: its fixed settings, and factories of its parts."""

    def __init__(self, config, workdir: pathlib.Path):
        self.config, self.workdir = config, workdir
        self.lock: workdir_lock.Lock | None = None  # of process 0, the only writer of metrics
        self.manifest: Manifest = load_data(config, workdir)
        mesh = sharding.make_mesh(config.mesh)
        self.built = build.build_model(config, self.manifest.tokenizer, mesh)
        self.training = train_step.Trainer(config, self.built)
        config_lib.validate_evaluation(config, sharding.num_row_shards(mesh))
        self.metrics_entries = 0  # in the resumed checkpoint's meta

    def restore_or_init(self, checkpoints) -> tuple[TrainState, int]:
        """The latest checkpoint's state and data cursor, or a new state at cursor 0, with
        the weights of config.init_from if given; created with its shardings."""
        if not checkpoints.has_steps():
            like = self.training.abstract_state().ema
            return self.training.init(restore.initial_weights(self.config, self.manifest, like)), 0
        state, meta = checkpoints.restore(
            self.training.abstract_state(),
            functools.partial(
                restore.check_can_be_resumed, self.config, self.manifest, self.workdir
            ),
        )
        if change := jax_settings.change_since(meta):
            print(change)
        self.metrics_entries = meta.get("metrics_entries", 0)
        finite.check_finite(
            {"params": state.params, "ema": state.ema, "optimizer": state.opt_state},
            f"{self.workdir / checkpoint_steps.FOLDER}/{int(state.step)}",
            "move this folder away to resume from the step before it, or train in a new --workdir",
        )
        return self.training.begin(state, skipped=meta.get("skipped_steps", 0)), meta["cursor"]

    def check_health(self, state: TrainState, checkpoints, step: int) -> int:
        """The number of skipped steps up to `step`; waits for the device.

        Raises:
          UserError: the run must end; the message names the last good checkpoint.
        """
        fault = health.fault(state.health, self.config)
        if not fault:
            return int(state.health.skipped)
        try:
            checkpoints.close()
        except UserError as error:
            fault = f"{fault}; {error}"
        good = checkpoints.latest_step
        last_good = "none" if good is None else f"{self.workdir / checkpoint_steps.FOLDER}/{good}"
        raise UserError(
            f"{fault}. Training ended at step {step}; last good checkpoint: {last_good}"
        )

    def skips(self, skipped: int) -> dict:
        """The metric for skipped steps, if steps may be skipped."""
        return {"skipped_steps": skipped} if self.config.train.on_non_finite == "skip" else {}

    def meta(self, cursor: int, metrics_entries: int, skipped: int) -> dict:
        return {
            "config": config_lib.to_saved(self.config),
            "cursor": cursor,
            "metrics_entries": metrics_entries,
            "skipped_steps": skipped,
            "tokenizer": self.manifest.tokenizer,
            "training_data": provenance.training_data(self.manifest),
            "version": esolm_jax.__version__,
            "prng": prng.IMPL,
            "jax_settings": jax_settings.recorded(),
        }


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The inputs and outputs of the training loop.

    Attributes:
      estimators: metrics of the validation split, by name.
    """

    run: Run
    checkpoints: checkpoint.Checkpoints
    reader: TrainReader
    metrics: metrics_lib.Metrics
    estimators: dict
    profile: profiling.Profile
    limit: time_limit.TimeLimit

    def log(self, state: TrainState, step: int, values: dict) -> None:
        skipped = self.run.check_health(state, self.checkpoints, step)
        values = {name: float(value) for name, value in values.items()}
        self.metrics.log(step, values | self.run.skips(skipped), timed=True)

    def validate(self, state: TrainState, step: int) -> float:
        """Logs the metrics of the validation split; the NELBO."""
        self.run.check_health(state, self.checkpoints, step)
        with self.limit.timing_validation():
            validation = _validate(self.run, self.estimators, state)
        nelbo = validation["nelbo"]
        self.metrics.log(step, {f"validation_{name}": v for name, v in validation.items()})
        if not math.isfinite(nelbo):
            self.metrics.print(
                f"the NELBO at step {step} is {nelbo}, although all weights are finite"
            )
        self.metrics.pause()
        return nelbo

    def save(self, state: TrainState, step: int, nelbo: float | None) -> None:
        skipped = self.run.check_health(state, self.checkpoints, step)
        meta = self.run.meta(self.reader.cursor, self.metrics.entries, skipped)
        self.checkpoints.save(state, meta, nelbo=nelbo)
        self.metrics.pause()

    def ending(self, state: TrainState, step: int, stop: StopSignal) -> tuple[int, str] | None:
        """(exit code, reason) if training must end at `step`; the same step in all processes."""
        if number := stop.after(step):
            return 128 + number, ""
        t = self.run.config.train
        if not t.time_limit or step % t.log_every:
            return None
        saving = time_limit.checkpoint_seconds(self.checkpoints.save_seconds, state)
        if self.limit.is_reached(step, self.metrics.clock.step_seconds, saving):
            return 0, f", because of config.train.time_limit={t.time_limit} (minutes)"
        return None

    def steps(self, state: TrainState, first: int, stop: StopSignal) -> int | None:
        """Runs the steps after `first`; the exit code if they ended early, else None."""
        run, t, step_fn = self.run, self.run.config.train, self.run.training.step_fn()
        mesh = run.built.mesh
        for step in range(first + 1, t.steps + 1):
            self.profile.before(step, state)
            with self.metrics.clock.waiting_for_data():
                rows = next(self.reader)
            state, values = step_fn(state, sharding.put_batch(rows, mesh, t.batch_size))
            self.profile.after(step, state)
            is_last, nelbo = step == t.steps, None
            self.metrics.advance()
            if step % t.log_every == 0 or is_last:
                self.log(state, step, values)
            if step % t.eval_every == 0 or is_last:
                nelbo = self.validate(state, step)
            ending = self.ending(state, step, stop)
            if run.lock:
                run.lock.check()
            if step % t.checkpoint_every == 0 or is_last or ending:
                self.save(state, step, nelbo)
            if ending and not is_last:
                code, reason = ending
                self.metrics.print(
                    f"stopped at step {step}{reason}; run the same command again to continue"
                )
                return code
        if first < t.steps and (skipped := int(state.health.skipped)):
            self.metrics.print(f"skipped steps (not finite): {skipped:,}")
        return None


def _train(run: Run, checkpoints, state: TrainState, cursor: int) -> int | None:
    """Runs the remaining steps. Returns the exit code if the run ended early, else None."""
    config, t = run.config, run.config.train
    estimators = {
        metric.name: metric.make(config, run.built, 1)
        for metric in eval_metrics.selected(t.metrics, config)
    }
    reader = TrainReader(
        run.manifest,
        batch_size=t.batch_size,
        rows=sharding.local_rows(run.built.mesh, t.batch_size),
        seed=config.seed,
        workers=config.data.workers,
        cursor=cursor,
    )
    first, cost = int(state.step), lower_bound.step_cost(run.training)
    is_main, stop = distributed.is_main(), StopSignal()
    metrics = metrics_lib.Metrics(
        run.workdir,
        step=first,
        steps=t.steps,
        clock=speed.StepClock(first, cost, run.built.mesh.local_devices),
        enabled=is_main,
        entries=run.metrics_entries,
    )
    profile = profiling.Profile(
        t.profile_steps, run.workdir, enabled=is_main, clock=metrics.clock, announce=metrics.print
    )
    loop = _Loop(run, checkpoints, reader, metrics, estimators, profile, time_limit.TimeLimit(t))
    with contextlib.closing(reader), contextlib.closing(metrics), contextlib.closing(profile):
        if first < t.steps:
            metrics.print("compiling the training step (part of the time of the first step)")
        return loop.steps(state, first, stop)


def _validate(run: Run, estimators: dict, state: TrainState) -> dict[str, float]:
    """Metrics of a part of the validation split under the EMA weights, by name."""
    config, manifest = run.config, run.manifest
    return {
        name: estimate(
            state.ema,
            eval_batches(config, manifest, "validation", config.train.eval_windows, run.built.mesh),
            split=manifest.split("validation"),
            seed=config.seed,
            progress="validation",
            total=None,
        ).value
        for name, estimate in estimators.items()
    }


def main(config, workdir: pathlib.Path) -> None:
    run = Run(config, workdir)
    memory_limit.check_training(config, run.built.model, run.built.mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    results.check_can_write(workdir / metrics_lib.FILE)
    hold = workdir_lock.hold(workdir, name=f"--workdir={workdir}")
    with contextlib.ExitStack() as stack:
        run.lock = multihost.on_main(lambda: stack.enter_context(hold))
        _run(run)


def _run(run: Run) -> None:
    config, workdir = run.config, run.workdir
    checkpoints = checkpoint.Checkpoints(
        workdir, keep_last=config.train.keep_last, keep_best=config.train.keep_best
    )
    state, cursor = run.restore_or_init(checkpoints)
    checkpoints.open()
    if checkpoints.latest_step is not None:
        print(f"resuming {workdir} at step {int(state.step)}")
    if distributed.is_main():
        run.manifest.copy_tokenizer(workdir / "tokenizer")
        results.write_json(workdir / "config.json", config_lib.to_saved(config))
    count = sum(a.size for a in jax.tree.leaves(state.params))
    print(
        f"{config.objective}, alpha_0 = {config.alpha_0}: {count:,} parameters, "
        f"{config.train.batch_size} x {config.data.seq_len} tokens a step on "
        f"{sharding.describe(run.built.mesh)}"
    )
    exit_code = _train(run, checkpoints, state, cursor)
    checkpoints.close()
    if exit_code is not None:
        sys.exit(exit_code)
    if not distributed.is_main():
        return
    baseline = unigram_perplexity(run.manifest, "validation")
    curve = metrics_lib.plot_learning_curve(
        workdir, baseline=baseline, training=not config.low_variance
    )
    print(f"wrote {workdir}/checkpoints, {workdir}/{metrics_lib.FILE}, {curve}")
    fits = cli.mesh_flags(config, run.built.mesh)
    print(cli.next_command("evaluate", workdir, *fits, keep=cli.CHECKPOINT_DATA_AND_DEVICES))


CLI = cli.Verb(stoppable=True)

if __name__ == "__main__":
    cli.run(main, CLI)
