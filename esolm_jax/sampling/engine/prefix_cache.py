"""The KV cache of CPUs and TPUs: attention to a prefix of the cache. Float32 softmax, exact.

The number of filled slots grows pass by pass, so a program has branches for prefixes of the cache.
"""

import functools
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from esolm_jax.attention.dense import MASKED
from esolm_jax.attention.recompute import pad_to_multiple
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine import cpu_kernels, quantize
from esolm_jax.sampling.engine.cache import (
    Entries,
    Heads,
    KeepsNothing,
    KeyValue,
    Visible,
    entries_of,
)
from esolm_jax.sampling.engine.project import Projection
from esolm_jax.sampling.engine.quantize import Quantized, Slots

AXES = ("rows", "heads")  # logical axes of all arrays of a cache
SLOTS = 64  # a prefix is a multiple, so that all parts have one size
PREFIXES = 8
QUERY_CHUNK = 256  # tokens of a window that attend at a time: bounds the memory of their scores


@flax.struct.dataclass
class NoCache(KeepsNothing):
    """See cache.no_cache."""

    @property
    def projection(self) -> Projection:
        return Projection()

    def attend(self, block: int, heads: Heads, visible: Visible):
        del block
        return _attend(heads, lambda *qkv: _attend_prefix(*qkv, visible, 0, None))


@flax.struct.dataclass
class PrefixCache:
    """Keys and values of S slots for each block.

    Attributes:
      keys: [block], [B, G, J, K, I]: J groups of I interleaved slots, see cpu_kernels.key_slots.
      values: [block], [B, G, S, K]. The scales of quantized ones are [B, G, S].
      aligned: all rows write to the same slots.
    """

    keys: tuple[Slots, ...]
    values: tuple[Slots, ...]
    aligned: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def projection(self) -> Projection:
        return Projection()

    @property
    def prefixes(self) -> list[int]:
        """Numbers of slots that a pass may read: it reads the smallest that holds all filled
        ones."""
        slots = self.values[0].shape[2]
        unit = SLOTS * -(-slots // (PREFIXES * SLOTS))
        return [*range(unit, slots, unit), slots]

    def attend(self, block: int, heads: Heads, visible: Visible):
        past = self.keys[block], self.values[block]
        return _attend_switch(tuple(self.prefixes), heads, visible, past)

    def pending(self, pairs: list[KeyValue], output) -> Entries:
        return entries_of(pairs, output, token_axis=2)

    def write(self, entries: Entries, start_B) -> Self:
        start_B = start_B + entries.reads_done

        def put_all(one, olds, news):
            start, axis = (start_B[0], None) if self.aligned else (start_B, 0)

            def rows(put):
                return lambda old, new: jax.vmap(put, in_axes=(0, 0, axis))(old, new, start)

            pairs = zip(olds, news, strict=True)
            return tuple(quantize.update(old, new, rows(one), rows(_put)) for old, new in pairs)

        return self.replace(
            keys=put_all(_put_keys, self.keys, entries.keys),
            values=put_all(_put, self.values, entries.values),
        )


def empty(
    config: ModelConfig, batch: int, slots: int, mesh: Mesh | None, aligned: bool, dtype: str
) -> PrefixCache:
    interleaved, width = cpu_kernels.key_slots(mesh), config.head_width

    def zeros(*shape):
        rows = batch, config.groups
        zero = quantize.zeros((*rows, *shape), (*rows, slots), dtype)
        constrain = functools.partial(jax.tree.map, lambda a: sharding.constrain(mesh, a, *AXES))
        return tuple(constrain(zero) for _ in range(config.blocks))

    keys = zeros(slots // interleaved, width, interleaved)
    return PrefixCache(keys=keys, values=zeros(slots, width), aligned=aligned)


def attend_all(heads: Heads, visible: Visible, past):
    """See KVCache.attend; `past`: (keys, values) [B, S, G·K] of which all slots are read, or None.
    Free of branches, for windows so wide that their products are dear."""
    if past is None:
        return NoCache().attend(0, heads, visible)
    split = heads.products.shape[2::2]
    keys, values = (jnp.moveaxis(_whole(a, split, heads.products.dtype), 1, 2) for a in past)
    slots = keys[..., None], values

    def attention(*qkv):
        return _attend_prefix(*qkv, visible, values.shape[2], slots)

    return _attend(heads, attention)


def _whole(slots: Slots, split: tuple[int, int], dtype):
    """[B, S, G, K] in a dtype, from [B, S, G·K] and scales [B, G, S]."""
    codes, scale = quantize.split(slots)
    codes_BSGK = codes.reshape(*codes.shape[:2], *split)
    if scale is None:
        return codes_BSGK
    return quantize.dequantize(Quantized(codes_BSGK, jnp.swapaxes(scale, 1, 2)), -1).astype(dtype)


@functools.partial(jax.jit, static_argnums=0, inline=True)  # traced once for all blocks
def _attend_switch(prefixes: tuple[int, ...], heads: Heads, visible: Visible, past):
    """See KVCache.attend; `past`: (keys, values) of a block, of which one of the prefixes is
    read."""
    index = jnp.sum(visible.filled.max() > jnp.array(prefixes[:-1], jnp.int32))

    def attention(*qkv):
        run = functools.partial(_attend_prefix, *qkv, visible)
        return jax.lax.switch(index, [functools.partial(run, n) for n in prefixes], past)

    return _attend(heads, attention)


def _attend(heads: Heads, attention):
    """See KVCache.attend. `attention`: queries [B, G, R, W, K], (keys, values [B, G, W, K]) →
    [B, G, R, W, K]."""
    q, k, v = heads.ready()
    return jnp.moveaxis(attention(q, (k, v)), 3, 1), (k, v)


def _attend_prefix(q_BGRWK, window, visible: Visible, prefix: int, past):
    """Attention to the window's (keys, values) and to the cache's slots below `prefix`, for
    QUERY_CHUNK tokens at a time."""
    run = functools.partial(
        _attend_chunk, window=window, filled_B=visible.filled, prefix=prefix, past=past
    )
    *heads, width, head_width = q_BGRWK.shape
    chunks = -(-width // QUERY_CHUNK)
    if chunks == 1:
        return run(q_BGRWK, visible.window_BWW)
    size = -(-width // chunks)
    q = pad_to_multiple(q_BGRWK, 3, size).reshape(*heads, chunks, size, head_width)
    mask = pad_to_multiple(visible.window_BWW, 1, size).reshape(-1, chunks, size, width)
    each = jnp.moveaxis(q, 3, 0), jnp.moveaxis(mask, 1, 0)
    out = jnp.moveaxis(jax.lax.map(lambda chunk: run(*chunk), each), 0, 3)
    return out.reshape(*heads, chunks * size, head_width)[:, :, :, :width]


def _attend_chunk(q_BGRWK, mask_BWW, *, window, filled_B, prefix: int, past):
    """Softmax in float32."""
    k_BGWK, v_BGWK = window
    batch, groups, per_group, queries, head_width = q_BGRWK.shape
    width = k_BGWK.shape[2]
    q = q_BGRWK.reshape(batch, groups, per_group * queries, head_width)
    here = cpu_kernels.attention_scores(q, k_BGWK[..., None], width)
    here = here.reshape(q_BGRWK.shape[:4] + (width,))
    here = jnp.where(mask_BWW[:, None, None], here, MASKED).reshape(*q.shape[:3], width)
    weigh = functools.partial(_weighted_values, dtype=v_BGWK.dtype)
    parts = [(here, functools.partial(weigh, values=v_BGWK, n=width))]
    if prefix:
        keys, values = past
        scores = _scores_of_cache(q, keys, prefix, filled_B)
        parts.append((scores, functools.partial(weigh, values=values, n=prefix)))
    top = functools.reduce(jnp.maximum, [scores.max(-1, keepdims=True) for scores, _ in parts])
    total, out = 0.0, 0.0
    for scores, weigh in parts:
        p = jnp.exp(scores - top)
        total, out = total + p.sum(-1, keepdims=True), out + weigh(p)
    return (out / total).reshape(q_BGRWK.shape)


def _weighted_values(p_BGTS, values: Slots, n: int, dtype):
    """See cpu_kernels.weighted_values; p is float32, and multiplies in `dtype`."""
    codes, scale = quantize.split(values)
    p = p_BGTS if scale is None else p_BGTS * scale[:, :, None, :n]
    return cpu_kernels.weighted_values(p.astype(dtype), codes, n)


def _scores_of_cache(q_BGTK, keys: Slots, prefix: int, filled_B):
    """[B, G, T, prefix]. The slots become one axis at the end only: XLA does not vectorise a loop
    over both."""
    keys_BGJKI, scale = quantize.split(keys)
    interleaved = keys_BGJKI.shape[4]
    parts = prefix // interleaved
    slot = jnp.arange(prefix).reshape(1, parts, interleaved)

    def some():
        seen = slot < filled_B[:, None, None]
        scores = cpu_kernels.attention_scores(q_BGTK, keys_BGJKI, parts)
        if scale is not None:
            scale_BGS = scale[:, :, :prefix]
            scores = scores * scale_BGS.reshape(*scale.shape[:2], 1, parts, interleaved)
        return jnp.where(seen[:, None, None], scores, MASKED)

    none = functools.partial(jnp.full, (*q_BGTK.shape[:3], parts, interleaved), MASKED, jnp.float32)
    # The branch also keeps XLA from computing the scores twice, for the maximum and for exp.
    scores = jax.lax.cond(filled_B.max() > 0, some, none)
    return scores.reshape(*q_BGTK.shape[:3], prefix)


def _put(old_GSK, new_GWK, start):
    return jax.lax.dynamic_update_slice_in_dim(old_GSK, new_GWK, start, axis=1)


def _put_keys(old_GJKI, new_GWK, start):
    """Updates all J that W slots may touch, as one slice."""
    groups, parts, width, interleaved = old_GJKI.shape
    touched = min(parts, 1 + -(-(new_GWK.shape[1] - 1) // interleaved))
    first = jnp.minimum(start // interleaved, parts - touched)
    part = jax.lax.dynamic_slice_in_dim(old_GJKI, first, touched, axis=1)
    slots = part.swapaxes(2, 3).reshape(groups, touched * interleaved, width)
    slots = _put(slots, new_GWK, start - first * interleaved)
    part = slots.reshape(groups, touched, interleaved, width).swapaxes(2, 3)
    return jax.lax.dynamic_update_slice_in_dim(old_GJKI, part, first, axis=1)
