"""Checkpoints: the only module that talks to Orbax.

A checkpoint is WORKDIR/checkpoints/<step> with four items: `params` and `ema` (each restorable
alone), `optimizer` (step, optimizer state, random key), and `meta` (JSON: the resolved config, the
data cursor, the tokenizer's identity, the code version). One of a pretrained model has `params` and
`meta` alone.
"""

import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from esolm_jax import config as config_lib
from esolm_jax.errors import UserError
from esolm_jax.train_step import TrainState

FOLDER = "checkpoints"
METRIC = "nelbo"
_PIECE = 2**25  # bytes that are written at a time of weights that lie on disk


def _options(keep_last: int, keep_best: int) -> ocp.CheckpointManagerOptions:
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
        preservation_policy=policies.AnyPreservationPolicy(keep),
        best_fn=_nelbo,  # without it Orbax would not write the metrics, and forget them
        best_mode="min",
        cleanup_tmp_directories=True,  # of saves that were killed midway
    )


def _nelbo(metrics: dict) -> float:
    return metrics[METRIC]


class Checkpoints:
    """The checkpoints of a workdir, to be written by `train`.

    Saves are asynchronous: `save` returns when the arrays are copied; call `close` at the end.
    """

    def __init__(self, workdir: pathlib.Path, *, keep_last: int, keep_best: int):
        self._manager = ocp.CheckpointManager(
            pathlib.Path(workdir).resolve() / FOLDER, options=_options(keep_last, keep_best)
        )

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict, *, nelbo: float | None = None) -> None:
        """Saves under the state's step; `nelbo` (validation, nats per token) ranks it."""
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                ema=ocp.args.StandardSave(state.ema),
                optimizer=ocp.args.StandardSave(_optimizer_item(state)),
                meta=ocp.args.JsonSave(meta),
            ),
            metrics=None if nelbo is None else {METRIC: float(nelbo)},
        )

    def save_weights(self, params: dict, meta: dict) -> None:
        """Saves weights alone, at step 0; arrays `OnDisk` are never in memory as a whole."""
        pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PIECE), params)
        saved = ocp.args.PyTreeSave(params, pieces, ocdbt_target_data_file_size=_PIECE)
        self._manager.save(0, args=ocp.args.Composite(params=saved, meta=ocp.args.JsonSave(meta)))

    def restore(self, like: TrainState) -> tuple[TrainState, dict]:
        """The latest state, placed as `like` (ShapeDtypeStructs with shardings), and its meta."""
        restored = self._manager.restore(
            self.latest_step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(like.params),
                ema=ocp.args.StandardRestore(like.ema),
                optimizer=ocp.args.StandardRestore(_optimizer_item(like)),
                meta=ocp.args.JsonRestore(),
            ),
        )
        state = TrainState(params=restored.params, ema=restored.ema, **restored.optimizer)
        return state, restored.meta

    def close(self) -> None:
        """Waits for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


class OnDisk(np.memmap):
    """A file that is an array. Orbax copies arrays before it writes them, lest they change
    meanwhile; this one does not change."""

    def __deepcopy__(self, memo) -> "OnDisk":
        return self


def _optimizer_item(state: TrainState) -> dict:
    return {"step": state.step, "opt_state": state.opt_state, "key": state.key}


def _reader(workdir, gigabytes: float = 96) -> tuple[ocp.CheckpointManager, int]:
    """Of the latest checkpoint, and its step; `gigabytes` may be under way at a time."""
    folder = pathlib.Path(workdir).resolve() / FOLDER
    if not folder.is_dir():
        raise UserError(
            f"--workdir={workdir}: no checkpoints here (there is no {FOLDER}/ in it); "
            "run `python -m esolm_jax.train` first"
        )
    manager = ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(read_only=True),
        item_handlers={
            "params": ocp.StandardCheckpointHandler(restore_concurrent_gb=gigabytes),
            "ema": ocp.StandardCheckpointHandler(restore_concurrent_gb=gigabytes),
            "optimizer": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        },
    )
    step = manager.latest_step()
    if step is None:
        raise UserError(f"--workdir={workdir}: {FOLDER}/ holds no finished checkpoint")
    return manager, step


def read_meta(workdir) -> dict:
    """The meta of the latest checkpoint. UserError if the workdir has none."""
    manager, step = _reader(workdir)
    with manager:
        try:
            return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        except (KeyError, ValueError, FileNotFoundError) as error:
            raise UserError(
                f"--workdir={workdir}: {FOLDER}/{step} is not a checkpoint of esolm_jax"
            ) from error


def saved_config(workdir) -> ConfigDict:
    """The resolved config of the latest checkpoint, locked."""
    return config_lib.from_saved(read_meta(workdir)["config"])


def restore_weights(workdir, which: str, like) -> tuple[dict, int]:
    """Weights of the latest checkpoint and its step.

    Args:
      which: "ema" or "raw"; of a pretrained model, they are the same.
      like: pytree of ShapeDtypeStruct with shardings, of the model's parameters.

    Raises:
      UserError: the checkpoint is of a model of other sizes.
    """
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    # What is under way is in memory twice: one parameter at a time, or what is as large.
    manager, step = _reader(workdir, 1.01 * largest / 1e9)
    item = {"ema": "ema", "raw": "params"}[which]
    with manager:
        items = manager.item_metadata(step)
        item = item if item in items else "params"
        _check_shapes(workdir, items[item], like)
        restored = manager.restore(
            step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(like)})
        )
    return restored[item], step


def _check_shapes(workdir, saved, like) -> None:
    def shapes(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}

    have, want = shapes(getattr(saved, "tree", saved)), shapes(like)
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) != want.get(name):
            raise UserError(
                f"--workdir={workdir}: a checkpoint of another model: parameter {name} has shape "
                f"{have.get(name)} there, {want.get(name)} in config.model"
            )
