"""Products of few queries with the cache: as loops on a CPU, as matrix products elsewhere.

XLA for CPUs copies the slice of the cache that it gives to a product of matrices, and is slow at
many small ones; its loops read the cache where it lies.
"""

import functools
import math

import jax
import jax.numpy as jnp

FEW_QUERIES = 12  # of a group of heads: for more of them a CPU is faster at matrix products
FOLD = 16  # places that a loop reads at once


def scores(q_BGTK, keys_BGKS, s: int):
    """float32 [B, G, T, s]: of T queries with the first s keys."""
    return _of_queries(_multiply_add, _scores, q_BGTK, keys_BGKS, s)


def weighted(p_BGTS, values_BGSK, s: int):
    """float32 [B, G, T, K]: the first s values, weighted by p [B, G, T, s]."""
    return _of_queries(_weighted_sum, _weighted, p_BGTS, values_BGSK, s)


def _of_queries(loops, whole, a, b, s: int):
    loops, whole = (functools.partial(f, s=s) for f in (loops, whole))
    if a.shape[2] > FEW_QUERIES:
        return whole(a, b)
    return jax.lax.platform_dependent(a, b, cpu=loops, default=whole)


def _scores(q, keys, s: int):
    return jnp.matmul(q, keys[..., :s], preferred_element_type=jnp.float32)


def _weighted(p, values, s: int):
    return jnp.matmul(p, values[:, :, :s], preferred_element_type=jnp.float32)


def _multiply_add(q, keys_BGKS, s: int):
    """One loop over s that adds K products, which are few."""
    keys, q = keys_BGKS[:, :, None].astype(jnp.float32), q.astype(jnp.float32)
    each = [q[..., i, None] * keys[:, :, :, i, :s] for i in range(q.shape[3])]
    return functools.reduce(jnp.add, each)


def _weighted_sum(p, values_BGSK, s: int):
    """One loop folds s; a product with ones adds what is left, for XLA would make one loop of two
    folds, which reads too many places at once."""
    values, p = values_BGSK[:, :, None].astype(jnp.float32), p[..., None].astype(jnp.float32)
    step = s // math.gcd(FOLD, s) if s > FOLD else 1
    parts = [slice(at, at + step) for at in range(0, s, step)]
    out = functools.reduce(jnp.add, [p[:, :, :, at] * values[:, :, :, at] for at in parts])
    if step > 1:
        out = jnp.matmul(jnp.ones((*out.shape[:3], 1, step)), out)
    return out[:, :, :, 0]
