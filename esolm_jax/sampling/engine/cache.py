"""The KV cache of generation as explicit state, and attention to it: float32 softmax, exact.

A window of W tokens reads itself by the rule of attention, and of the cache all slots that are
filled. What is filled grows pass by pass, so a program has branches for prefixes of the cache.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from esolm_jax.attention.dense import MASKED
from esolm_jax.attention.recompute import pad_to_multiple
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine import cpu_kernels

SLOTS, FEW_SLOTS = 64, 8  # caches are of multiples of these, so that parts of them are alike
PREFIXES = 8
TOKENS = 256  # of a window at a time: scores of all take memory of its length squared


@flax.struct.dataclass
class Cache:
    """Keys and values of S slots for each block.

    Attributes:
      keys: [block], [B, G, J, K, I]: J groups of I slots, see products.key_slots.
      values: [block], [B, G, S, K].
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @property
    def prefixes(self) -> list[int]:
        """How many slots a pass may read: the least of these that holds what is filled."""
        slots = self.values[0].shape[2]
        unit = SLOTS * -(-slots // (PREFIXES * SLOTS))
        return [*range(unit, slots, unit), slots]


def round_up(slots: int) -> int:
    """How many slots a cache of at least so many has."""
    unit = SLOTS if slots > SLOTS else FEW_SLOTS
    return unit * -(-slots // unit)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_cache(config: ModelConfig, batch: int, slots: int, mesh: Mesh | None = None) -> Cache:
    """A cache for B = `batch` rows of at least `slots`, a window's margin included; rows are
    sharded over the mesh as their tokens are."""
    together, width, slots = cpu_kernels.key_slots(mesh), config.head_width, round_up(slots)

    def zeros(*shape):
        zero = jnp.zeros((batch, config.groups, *shape), config.dtype)
        return tuple(sharding.constrain(mesh, zero, "rows", "heads") for _ in range(config.blocks))

    return Cache(keys=zeros(slots // together, width, together), values=zeros(slots, width))


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
    """Attention to the window and to the cache's slots below `prefix`, some tokens at a time."""
    run = functools.partial(_attend_at_once, k=k, v=v, filled_B=filled_B, prefix=prefix, past=past)
    *heads, width, head_width = q_BGRWK.shape
    parts = -(-width // TOKENS)
    if parts == 1:
        return run(q_BGRWK, mask_BWW)
    size = -(-width // parts)
    q = pad_to_multiple(q_BGRWK, 3, size).reshape(*heads, parts, size, head_width)
    mask = pad_to_multiple(mask_BWW, 1, size).reshape(-1, parts, size, width)
    each = jnp.moveaxis(q, 3, 0), jnp.moveaxis(mask, 1, 0)
    out = jnp.moveaxis(jax.lax.map(lambda part: run(*part), each), 0, 3)
    return out.reshape(*heads, parts * size, head_width)[:, :, :, :width]


def _attend_at_once(q_BGRWK, mask_BWW, *, k, v, filled_B, prefix: int, past):
    """Softmax in float32."""
    batch, groups, per_group, width, head_width = q_BGRWK.shape
    window = k.shape[2]
    q = q_BGRWK.reshape(batch, groups, per_group * width, head_width)
    here = cpu_kernels.scores(q, k[..., None], window).reshape(q_BGRWK.shape[:4] + (window,))
    here = jnp.where(mask_BWW[:, None, None], here, MASKED).reshape(*q.shape[:3], window)
    parts = [(here, lambda p: cpu_kernels.weighted(p, v, window))]
    if prefix:
        keys, values = past
        score = _scores_of_cache(q, keys, prefix, filled_B)
        parts.append((score, lambda p: cpu_kernels.weighted(p, values, prefix)))
    top = functools.reduce(jnp.maximum, [score.max(-1, keepdims=True) for score, _ in parts])
    total, out = 0.0, 0.0
    for score, weigh in parts:
        p = jnp.exp(score - top)
        total, out = total + p.sum(-1, keepdims=True), out + weigh(p.astype(v.dtype))
    return (out / total).reshape(q_BGRWK.shape)


def _scores_of_cache(q_BGTK, keys_BGJKI, prefix: int, filled_B):
    """[B, G, T, prefix]. The slots are one axis only once all is computed, for XLA would not
    vectorise a loop over both."""
    together = keys_BGJKI.shape[4]
    parts = prefix // together
    slot = jnp.arange(prefix).reshape(1, parts, together)

    def some():
        seen = slot < filled_B[:, None, None]
        score = cpu_kernels.scores(q_BGTK, keys_BGJKI, parts)
        return jnp.where(seen[:, None, None], score, MASKED)

    none = functools.partial(jnp.full, (*q_BGTK.shape[:3], parts, together), MASKED, jnp.float32)
    # A branch also keeps XLA from computing it twice, for the maximum and for exp.
    score = jax.lax.cond(filled_B.max() > 0, some, none)
    return score.reshape(*q_BGTK.shape[:3], prefix)


def write(cache: Cache, keys, values, start, after, *, aligned: bool) -> Cache:
    """Puts what a pass returned into slots [start, start + W).

    Args:
      keys, values: [block], [B, G, W, K].
      start: int32 [B]; start + W must not exceed the slots.
      after: int32, at least 0, that follows from all that the pass read of the cache. Writing has
        to wait for it; XLA would copy the cache before each pass if it saw no such order.
      aligned: all rows start at the same slot, which is faster.
    """
    start = start + jnp.minimum(after.min(), 0)

    def put_all(one, olds, news):
        at, axis = (start[0], None) if aligned else (start, 0)
        put = jax.vmap(one, in_axes=(0, 0, axis))
        return tuple(put(old, new, at) for old, new in zip(olds, news, strict=True))

    return cache.replace(
        keys=put_all(_put_keys, cache.keys, keys), values=put_all(_put, cache.values, values)
    )


def _put(old_GSK, new_GWK, start):
    return jax.lax.dynamic_update_slice_in_dim(old_GSK, new_GWK, start, axis=1)


def _put_keys(old_GJKI, new_GWK, start):
    """In all J that W slots may touch, one after the other."""
    groups, parts, width, together = old_GJKI.shape
    touched = min(parts, 1 + -(-(new_GWK.shape[1] - 1) // together))
    first = jnp.minimum(start // together, parts - touched)
    part = jax.lax.dynamic_slice_in_dim(old_GJKI, first, touched, axis=1)
    slots = part.swapaxes(2, 3).reshape(groups, touched * together, width)
    slots = _put(slots, new_GWK, start - first * together)
    part = slots.reshape(groups, touched, together, width).swapaxes(2, 3)
    return jax.lax.dynamic_update_slice_in_dim(old_GJKI, part, first, axis=1)
