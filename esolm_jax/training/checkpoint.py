"""Checkpoints: the only module that talks to Orbax.

A checkpoint is WORKDIR/checkpoints/<step> with four items: `params` and `ema` (each restorable
alone), `optimizer` (step, optimizer state, random key), and `meta` (JSON: the resolved config, the
data cursor, the tokenizer's identity, the code version). One of a pretrained model has `params` and
`meta` alone. checkpoint_digests.py detects damage, checkpoint_steps.py selects the step to read.
"""

import math
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.path import atomicity_types

from esolm_jax import config as config_lib
from esolm_jax.errors import UserError
from esolm_jax.parallel import distributed
from esolm_jax.training import checkpoint_digests, checkpoint_steps
from esolm_jax.training.checkpoint_digests import Damaged
from esolm_jax.training.checkpoint_steps import (
    FOLDER,
    LATEST,
    METRIC,
    Step,
    check_selector,
    split_source,
)
from esolm_jax.training.train_state import TrainState

__all__ = ["FOLDER", "LATEST", "METRIC", "check_selector", "split_source"]
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
        best_fn=_nelbo,  # without it Orbax would not write the metrics, and forget them
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
        damaged = checkpoint_steps.agree_on(damaged)
        checkpoint_steps.set_aside(self._workdir, damaged)
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
        self._saving = step
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
            restored = {item: _restore(step, item, target) for item, target in targets.items()}
            state = TrainState(
                params=restored["params"], ema=restored["ema"], **restored["optimizer"]
            )
            if int(state.step) != step.number:
                raise Damaged(f"{step.folder}: holds the state of step {int(state.step)}")
            _say_if_not_verified(step)
            return state, step.meta

        def items(meta: dict) -> list[str]:
            check(meta)
            return list(targets)

        found, damaged = checkpoint_steps.read_intact(self._workdir, LATEST, items, read)
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


def _restore(step: Step, item: str, like, gigabytes: float = 96):
    """One item of a step, placed as `like`, with at most `gigabytes` in flight.

    Raises:
      Damaged: it cannot be read, and no digest shows that it is intact.
      UserError: the shapes of the weights differ from those of `like`.
    """
    folder = step.folder / item
    handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=gigabytes)
    try:
        with ocp.Checkpointer(handler) as reader:
            if item != "optimizer":
                saved = reader.metadata(folder)
                saved = getattr(saved, "item_metadata", saved)
                if saved is None:  # Orbax hides the reason
                    raise ValueError("no metadata of arrays")
                _check_shapes(folder, saved, like)
            return reader.restore(folder, args=ocp.args.StandardRestore(like))
    except Exception as error:  # Orbax and TensorStore raise many types
        # A step that is being deleted can look like one of another model.
        gone = checkpoint_digests.problem(step.folder, [item])
        no_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
        if no_memory or ((step.verified or isinstance(error, UserError)) and not gone):
            raise
        what = " ".join(str(error).split())[:200]
        raise Damaged(f"{folder}: cannot be read ({type(error).__name__}: {what})") from error


def _say_if_not_verified(step: Step) -> None:
    if not step.verified:
        checkpoint_steps.say(f"{step.folder}: was written without digests: cannot be verified")


def _check_meta_alone(meta: dict) -> list[str]:
    del meta
    return []


def read_meta(workdir, step: str = LATEST) -> dict:
    """The meta of a checkpoint ("latest", "best" or a number). UserError if there is none."""
    meta, _ = checkpoint_steps.read_intact(
        workdir, step, _check_meta_alone, lambda found: found.meta
    )
    return meta


def saved_config(workdir, step: str = LATEST) -> ConfigDict:
    """The resolved config of a checkpoint, locked."""
    return config_in(read_meta(workdir, step), workdir)


def config_in(meta: dict, workdir="the checkpoint") -> ConfigDict:
    """The config in the meta of a checkpoint, locked. UserError: not of a version that we read."""
    return config_lib.from_saved(meta["config"], str(workdir))


_config_read: dict[pathlib.Path, dict] = {}  # by workdir: the saved config of this command
_OF_THE_RUN = ("train.", "optimizer.", "mesh.", "distributed.", "init_from", "data.workers")


def begin_command() -> None:
    """Clears the state of an earlier command in this process."""
    _config_read.clear()
    config_lib.begin_command()
    checkpoint_steps.forget_what_was_said()


def config_of_command(workdir, step: str) -> ConfigDict:
    """The saved config for a command without --config; see check_config_is_of."""
    meta = read_meta(workdir, step)
    _config_read[pathlib.Path(workdir).resolve()] = meta["config"]
    return config_in(meta, workdir)


def check_config_is_of(workdir, meta: dict) -> None:
    """UserError unless the command's saved config equals that of the step of the weights.

    The two can come from different steps if the first step is deleted or damaged. Their settings
    differ if training was resumed with other settings in between.
    """
    read = _config_read.get(pathlib.Path(workdir).resolve())
    if read is None or read == meta["config"]:
        return
    have, want = (
        config_lib.flat(config_lib.from_saved(saved, str(workdir)))
        for saved in (read, meta["config"])
    )
    for name in sorted(have):
        if have[name] != want[name] and not name.startswith(_OF_THE_RUN):
            raise UserError(
                f"--workdir={workdir}: the config was read from one checkpoint and the weights "
                f"from another with other settings (config.{name}="
                f"{want[name]!r}, not {have[name]!r}); name one with --step=N"
            )


def digest_of(workdir, step: int) -> str | None:
    """The SHA-256 of the list of digests of a step's files; None for a step without digests.

    Raises:
      UserError: there is no such step, or its digests are damaged or of an unsupported algorithm.
    """
    folder = checkpoint_steps.step_folder(workdir, step)
    try:
        entry = checkpoint_digests.read(folder)
    except Damaged as error:
        raise UserError(f"{error}: step {step} is damaged") from error
    return None if entry is None else entry["digest"]


def items_of(meta: dict) -> list[str]:
    """The items with arrays of a checkpoint with this meta."""
    return ["params"] if meta.get("only_weights") else ["params", "ema", "optimizer"]


def weights_item(which: str, meta: dict) -> str:
    """Where the weights "ema" or "raw" are; those of a pretrained model are one set."""
    return "ema" if which == "ema" and not meta.get("only_weights") else "params"


def read_weights(
    workdir, which: str, like_of: Callable[[dict], dict], step: str = LATEST
) -> tuple[dict, Step]:
    """Verified weights of a checkpoint, and their step.

    Args:
      which: "ema" or "raw".
      like_of: from the checkpoint's meta to a pytree of ShapeDtypeStruct with shardings, of the
        model's parameters; raises UserError for an unsuitable checkpoint.
      step: "latest", "best" or a number.

    Raises:
      UserError: there is no such step, no step is intact, or the shapes differ.
    """

    def items(meta: dict) -> list[str]:
        like_of(meta)
        return [weights_item(which, meta)]

    def read(found: Step) -> tuple[dict, Step]:
        like = like_of(found.meta)
        largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
        # Parameters in flight are in memory twice, so at most as much as the largest one.
        item = weights_item(which, found.meta)
        weights = _restore(found, item, like, 1.01 * largest / 1e9)
        _say_if_not_verified(found)
        return weights, found

    return checkpoint_steps.read_intact(workdir, step, items, read)[0]


def restore_weights(workdir, which: str, like, step: str = LATEST) -> tuple[dict, int]:
    """Weights of a checkpoint and its step: read_weights for a known model."""
    weights, found = read_weights(workdir, which, lambda meta: like, step)
    return weights, found.number


def _check_shapes(folder, saved, like) -> None:
    def shapes(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}

    have, want = shapes(getattr(saved, "tree", saved)), shapes(like)
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) != want.get(name):
            raise UserError(
                f"{folder}: a checkpoint of another model: parameter {name} has shape "
                f"{have.get(name)} there, {want.get(name)} in config.model"
            )
