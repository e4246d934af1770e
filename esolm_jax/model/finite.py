"""Refuses non-finite weights: the check of all readers of weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from esolm_jax.errors import UserError
from esolm_jax.parallel import multihost

_PIECE = 2**20  # values of a NumPy array or of a file that are examined at a time
_ADVICE = "use weights that were saved before training diverged"


def check_finite(tree, source: str, advice: str = _ADVICE) -> None:
    """UserError unless every floating-point value in a tree of arrays is finite.

    One program examines JAX arrays on their devices, so all processes must call this and get the
    same result. NumPy arrays, also on disk, are examined in pieces.

    Args:
      tree: any pytree. source: the origin of the tree; the message begins with it.
    """
    refuse(non_finite(tree), len(jax.tree.leaves(tree)), source, advice)


def refuse(bad: list[str], total: int, source: str, advice: str = _ADVICE) -> None:
    """UserError if any of the `total` tensors of `source` is `bad`: not finite."""
    if bad:
        count = f"{len(bad)} of its {total} tensors do"
        raise UserError(f"{source}: tensor {bad[0]} holds NaN or infinity ({count}); {advice}")


def non_finite(tree) -> list[str]:
    """The names of the tensors that hold NaN or infinity, such as "blocks/qkv/kernel"."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    on_devices = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, jax.Array)}
    ok = {name: _is_finite(leaf) for name, leaf in leaves.items() if name not in on_devices}
    if on_devices:
        sharding = next(iter(on_devices.values())).sharding
        are_finite = _program(_replicated(sharding))(list(on_devices.values()))
        ok |= dict(zip(on_devices, np.asarray(are_finite), strict=True))
    return [name for name in leaves if not ok[name]]


def _is_finite(array: np.ndarray) -> bool:
    """Whether all values are finite as float32, the dtype of all weights."""
    flags = ["external_loop", "buffered", "zerosize_ok"]
    pieces = np.nditer(array, flags, order="K", buffersize=_PIECE)
    with np.errstate(over="ignore"):
        return all(np.isfinite(piece.astype(np.float32, copy=False)).all() for piece in pieces)


def _replicated(sharding) -> NamedSharding | None:
    """The replicated sharding on the same devices; None for an array on one device."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return None


@functools.cache
def _program(out_sharding):
    """Whether each of a list of arrays is finite: bool [arrays]."""

    def all_finite(arrays):
        return jnp.stack([jnp.all(jnp.isfinite(array)) for array in arrays])

    return multihost.together(jax.jit(all_finite, out_shardings=out_sharding))
