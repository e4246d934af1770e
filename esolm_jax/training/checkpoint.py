"""The checkpoints of a run: saved and restored with Orbax.

A checkpoint is WORKDIR/checkpoints/<step> with four items: `params` and `ema` (each restorable
alone), `optimizer` (step, optimizer state, random key), and `meta` (JSON: the resolved config, the
data cursor, the tokenizer's identity, the code version). One of a pretrained model has `params` and
`meta` alone. checkpoint_digests.py detects damage, checkpoint_selection.py selects the step.
"""

import math
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.path import atomicity_types

from esolm_jax.errors import UserError
from esolm_jax.parallel import distributed
from esolm_jax.training import checkpoint_digests, checkpoint_selection, checkpoint_steps
from esolm_jax.training.checkpoint_digests import Damaged
from esolm_jax.training.checkpoint_reader import restore_item, say_if_not_verified
from esolm_jax.training.checkpoint_selection import Step
from esolm_jax.training.checkpoint_steps import FOLDER, LATEST, METRIC
from esolm_jax.training.train_state import TrainState

_PIECE = 2**25  # bytes that are written at a time of weights that lie on disk


def _options(keep_last: int, keep_best: int, write_digests, sync) -> ocp.CheckpointManagerOptions:
    keep = [policies.LatestN(n=keep_last)]
    if keep_best:
        keep.append(
            policies.BestN(
                get_metric_fn=_nelbo,
                reverse=True,  # the lowest NELBO is the best
                n=keep_best,
                keep_checkpoints_without_metrics=False,
            )
        )
    return ocp.CheckpointManagerOptions(
        async_options=ocp.AsyncOptions(
            post_finalization_callback=write_digests, barrier_sync_fn=sync
        ),
        preservation_policy=policies.AnyPreservationPolicy(keep),
        best_fn=_nelbo,  # otherwise Orbax does not write the metrics
        best_mode="min",
        cleanup_tmp_directories=True,  # of saves that were killed midway
    )


def _nelbo(metrics: dict) -> float:
    value = metrics[METRIC]
    return value if math.isfinite(value) else math.inf  # NaN would break the sort


class Checkpoints:
    """The checkpoints of a workdir, to be written by `train`.

    Saves are asynchronous: `save` returns when the arrays are copied; call `close` at the end.
    """

    def __init__(self, workdir: pathlib.Path, *, keep_last: int, keep_best: int):
        self._workdir = pathlib.Path(workdir).resolve()
        self._keep = keep_last, keep_best
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None  # the step that is being written
        self._save_began = 0.0
        self.save_seconds: float | None = None  # of the longest save so far, in process 0

    @property
    def latest_step(self) -> int | None:
        """The newest finished step, intact or not; during a save, the step being saved."""
        if self._manager is not None:
            return self._manager.latest_step()
        return max(checkpoint_steps.steps_in(self._workdir), default=None)

    def has_steps(self) -> bool:
        """Whether there is a finished step, as process 0 sees it."""
        return bool(checkpoint_steps.agreed_steps(self._workdir))

    def open(self, damaged: dict[int, str] | None = None) -> None:
        """Prepares for saves. First moves the steps in `damaged` and those with unreadable metrics
        to another folder. UserError if the folder is not writable."""
        if self._manager is not None:
            return
        damaged = dict(damaged or {})
        for step in checkpoint_steps.steps_in(self._workdir):
            try:
                checkpoint_steps.nelbo(checkpoint_steps.step_folder(self._workdir, step))
            except Damaged as error:
                damaged.setdefault(step, str(error))
        damaged = checkpoint_selection.agree_on(damaged)
        checkpoint_selection.set_aside(self._workdir, damaged)
        try:
            self._manager = ocp.CheckpointManager(
                self._workdir / FOLDER,
                options=_options(*self._keep, self._write_digests, self._sync),
            )
        except OSError as error:
            raise UserError(f"{self._workdir / FOLDER}: cannot be written: {error}") from error

    def save(self, state: TrainState, meta: dict, *, nelbo: float | None = None) -> None:
        """Saves under the state's step; `nelbo` (validation, nats per token) ranks it.

        Raises:
          UserError: Orbax refuses the save, or the previous save failed.
        """
        self.open()
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            ema=ocp.args.StandardSave(state.ema),
            optimizer=ocp.args.StandardSave(_optimizer_item(state)),
            meta=ocp.args.JsonSave(meta),
        )
        ranked = nelbo is not None and math.isfinite(nelbo)
        self._save(step, items, {METRIC: float(nelbo)} if ranked else None)

    def save_weights(self, params: dict, meta: dict) -> None:
        """Saves weights alone, at step 0; arrays `OnDisk` are never in memory as a whole."""
        self.open()
        pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PIECE), params)
        saved = ocp.args.PyTreeSave(params, pieces, ocdbt_target_data_file_size=_PIECE)
        self._save(0, ocp.args.Composite(params=saved, meta=ocp.args.JsonSave(meta)), None)

    def _save(self, step: int, items, metrics: dict | None) -> None:
        self._wait()
        self._saving, self._save_began = step, time.perf_counter()
        saved = self._manager.save(
            step,
            args=items,
            metrics=metrics,
            custom_metadata={"digests": checkpoint_digests.ALGORITHM},
        )
        if not saved:
            raise UserError(
                f"{self._workdir / FOLDER}/{step}: was not saved: the newest step there is already "
                f"{self._manager.latest_step()}; is another run training in this workdir?"
            )

    def _wait(self) -> None:
        """Waits for the save under way. UserError if it failed."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, jax.errors.JaxRuntimeError):
                raise  # an error of other processes: see parallel/guard.py
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise UserError(
                f"{self._workdir / FOLDER}/{self._saving}: could not be saved: {what}"
            ) from error

    def _unfinished(self) -> pathlib.Path:
        """The folder of the step that is being written."""
        return self._workdir / FOLDER / f"{self._saving}{atomicity_types.TMP_DIR_SUFFIX}"

    def _write_digests(self) -> None:
        """A callback in process 0's saving thread, before Orbax renames the step."""
        checkpoint_digests.write(self._unfinished())
        taken = time.perf_counter() - self._save_began
        self.save_seconds = max(taken, self.save_seconds or 0.0)

    def _sync(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier; before the one after all arrays, each process hashes its own files."""
        if "async_write_complete" in key:
            checkpoint_digests.write_part(self._unfinished(), distributed.process_index())
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def restore(
        self, like: TrainState, check: Callable[[dict], None] = lambda meta: None
    ) -> tuple[TrainState, dict]:
        """The latest intact state, placed as `like` (ShapeDtypeStructs with shardings), its meta.

        Newer damaged steps are moved to another folder; they will be trained again. `check` gets
        the meta before anything is restored or moved.

        Raises:
          UserError: no step is intact, or `check` raised it.
        """
        targets = {"params": like.params, "ema": like.ema, "optimizer": _optimizer_item(like)}

        def read(step: Step) -> tuple[TrainState, dict]:
            check(step.meta)
            checkpoint_steps.nelbo(step.folder)  # raises Damaged: keep_best needs it
            restored = {item: restore_item(step, item, target) for item, target in targets.items()}
            state = TrainState(
                params=restored["params"], ema=restored["ema"], **restored["optimizer"]
            )
            if int(state.step) != step.number:
                raise Damaged(f"{step.folder}: holds the state of step {int(state.step)}")
            say_if_not_verified(step)
            return state, step.meta

        def items(meta: dict) -> list[str]:
            check(meta)
            return list(targets)

        found, damaged = checkpoint_selection.read_intact(self._workdir, LATEST, items, read)
        self.open(damaged)
        return found

    def close(self) -> None:
        """Waits for saves under way. UserError if one failed."""
        if self._manager is not None:
            self._wait()
            self._manager.close()


class OnDisk(np.memmap):
    """A file that is an array. Orbax copies arrays before it writes them, because they may
    change; this one does not change."""

    def __deepcopy__(self, memo) -> "OnDisk":
        return self


def _optimizer_item(state: TrainState) -> dict:
    return {"step": state.step, "opt_state": state.opt_state, "key": state.key}
