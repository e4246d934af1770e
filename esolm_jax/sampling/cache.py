"""The KV cache of generation as explicit state, and attention to it: float32 softmax, exact.

A window of W tokens reads itself by the rule of attention, and of the cache all slots that are
filled. What is filled grows pass by pass, so a program has branches for prefixes of the cache.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from esolm_jax import sharding
from esolm_jax.attention import MASKED
from esolm_jax.model import ModelConfig
from esolm_jax.sampling import products

SLOTS, FEW_SLOTS = 64, 8  # caches are of multiples of these, so that parts of them are alike
PREFIXES = 8


@flax.struct.dataclass
class Cache:
    """Keys and values of S slots for each block.

    Attributes:
      keys: [block], [B, G, K, S], as their product with queries wants them.
      values: [block], [B, G, S, K].
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @property
    def prefixes(self) -> list[int]:
        """How many slots a pass may read: the least of these that holds what is filled."""
        slots = self.keys[0].shape[3]
        unit = SLOTS * -(-slots // (PREFIXES * SLOTS))
        return [*range(unit, slots, unit), slots]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_cache(config: ModelConfig, batch: int, slots: int, mesh: Mesh | None = None) -> Cache:
    """A cache for B = `batch` rows of at least `slots`, a window's margin included; the rows lie on
    the mesh as their tokens do."""
    where = None if mesh is None else sharding.place(mesh, "rows", "heads", None, None)
    unit = SLOTS if slots > SLOTS else FEW_SLOTS
    width, slots = config.head_width, unit * -(-slots // unit)

    def zeros(*shape):
        shape = batch, config.groups, *shape
        return tuple(jnp.zeros(shape, config.dtype, device=where) for _ in range(config.blocks))

    return Cache(keys=zeros(width, slots), values=zeros(slots, width))


def attend(q_BGRWK, k, v, mask_BWW, filled_B, cache: Cache | None, block: int):
    """Attention of a window to itself and to what is filled of a block's cache: [B, G, R, W, K].

    Args:
      q_BGRWK: queries, scaled by 1/√K; k, v: [B, G, W, K].
      mask_BWW: what in the window reads what of it.
      filled_B: slots below are read by all.
    """
    run = functools.partial(_attend_prefix, q_BGRWK, k, v, mask_BWW, filled_B)
    if cache is None:
        return run(0, None)
    past, prefixes = (cache.keys[block], cache.values[block]), cache.prefixes
    which = jnp.sum(filled_B.max() > jnp.array(prefixes[:-1], jnp.int32))
    return jax.lax.switch(which, [functools.partial(run, n) for n in prefixes], past)


def _attend_prefix(q_BGRWK, k, v, mask_BWW, filled_B, prefix: int, past):
    """Softmax in float32 over the window and the cache's slots below `prefix`."""
    batch, groups, per_group, width, head_width = q_BGRWK.shape
    q = q_BGRWK.reshape(batch, groups, per_group * width, head_width)
    here = products.scores(q, k.swapaxes(2, 3), width).reshape(q_BGRWK.shape[:4] + (width,))
    here = jnp.where(mask_BWW[:, None, None], here, MASKED).reshape(*q.shape[:3], width)
    parts = [(here, lambda p: products.weighted(p, v, width))]
    if prefix:
        keys, values = past
        score = jax.lax.cond(  # also lest XLA computes it twice, for its maximum and for exp
            filled_B.max() > 0,
            lambda: _where_filled(products.scores(q, keys, prefix), filled_B),
            lambda: jnp.full((*q.shape[:3], prefix), MASKED, jnp.float32),
        )
        parts.append((score, lambda p: products.weighted(p, values, prefix)))
    top = functools.reduce(jnp.maximum, [score.max(-1, keepdims=True) for score, _ in parts])
    total, out = 0.0, 0.0
    for score, weigh in parts:
        p = jnp.exp(score - top)
        total, out = total + p.sum(-1, keepdims=True), out + weigh(p.astype(v.dtype))
    return (out / total).reshape(q_BGRWK.shape)


def _where_filled(score_BGTS, filled_B):
    filled = jnp.arange(score_BGTS.shape[3])[None] < filled_B[:, None]
    return jnp.where(filled[:, None, None], score_BGTS, MASKED)


def write(cache: Cache, keys, values, start, after, *, aligned: bool) -> Cache:
    """Puts what a pass returned into slots [start, start + W).

    Args:
      start: int32 [B]; start + W must not exceed the slots.
      after: int32, at least 0, that follows from all that the pass read of the cache. Writing has
        to wait for it; XLA would copy the cache before each pass if it saw no such order.
      aligned: all rows start at the same slot, which is faster.
    """
    start = start + jnp.minimum(after.min(), 0)

    def put(old, new, axis):
        if aligned:
            return jax.lax.dynamic_update_slice_in_dim(old, new, start[0], axis)
        one = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1)
        return jax.vmap(one)(old, new, start)

    return cache.replace(
        keys=tuple(put(a, new, 3) for a, new in zip(cache.keys, keys, strict=True)),
        values=tuple(put(a, new, 2) for a, new in zip(cache.values, values, strict=True)),
    )
