"""Sums over the rows of the logits, in as few passes over them as the platform allows.

XLA reads the logits from a GPU's memory once for every reduction that it cannot fuse; one reduction
of several arrays is one pass. Elsewhere each array has its own reduction.
"""

import jax
import jax.numpy as jnp
import numpy as np

LOWEST = -1e30  # below every logit; its exponential is 0


def sum_rows(*arrays_PV, platform: str):
    """The sums of the rows of each array: tuple of [P]."""
    if platform != "gpu":
        return tuple(jnp.sum(a, axis=1) for a in arrays_PV)
    add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))  # noqa: E731
    return jax.lax.reduce(arrays_PV, (np.float32(0),) * len(arrays_PV), add, (1,))


def softmax_statistics(z_PV, other_PV, platform: str):
    """The largest value of each row, Σ exp(z − largest), and the sum of the other array: float32
    [P] each. On a GPU, the sum is scaled again whenever a larger value appears (online softmax)."""
    if platform != "gpu":
        top = jnp.max(z_PV, axis=1)
        return top, jnp.sum(jnp.exp(z_PV - top[:, None]), axis=1), jnp.sum(other_PV, axis=1)

    def merge(a, b):
        top = jnp.maximum(a[0], b[0])
        total = a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)
        return top, total, a[2] + b[2]

    start = np.float32(LOWEST), np.float32(0), np.float32(0)
    finite_PV = jnp.maximum(z_PV, LOWEST)  # −∞ − −∞ would be NaN
    return jax.lax.reduce((finite_PV, jnp.ones_like(z_PV), other_PV), start, merge, (1,))
