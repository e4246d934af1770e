"""Reads the verified arrays of a step: all of its items, or weights alone."""

from collections.abc import Callable

import jax

from esolm_jax.errors import UserError
from esolm_jax.training import checkpoint_digests, checkpoint_selection
from esolm_jax.training.checkpoint_digests import Damaged
from esolm_jax.training.checkpoint_meta import weights_item
from esolm_jax.training.checkpoint_selection import Step
from esolm_jax.training.checkpoint_steps import LATEST


def restore_item(step: Step, item: str, like, gigabytes: float = 96):
    """One item of a step, placed as `like`, with at most `gigabytes` in flight.

    Raises:
      Damaged: it cannot be read, and no digest shows that it is intact.
      UserError: the shapes of the weights differ from those of `like`.
    """
    import orbax.checkpoint as ocp  # takes 0.2 s, in which `sample` loads its programs

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


def say_if_not_verified(step: Step) -> None:
    if not step.verified:
        checkpoint_selection.say(f"{step.folder}: was written without digests: cannot be verified")


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
        weights = restore_item(found, item, like, 1.01 * largest / 1e9)
        say_if_not_verified(found)
        return weights, found

    return checkpoint_selection.read_intact(workdir, step, items, read)[0]


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
