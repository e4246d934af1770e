"""Attention of a decoding pass as one TPU kernel (Pallas, by way of Mosaic), without branches.

A program reads one tile of the filled slots of one row, for all heads at once: a block-diagonal
matrix of queries turns the scores of all groups into one product, so that narrow heads waste no
lanes. The number of filled slots is data: tiles behind it are neither read nor computed. Online
softmax in float32, exact.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from esolm_jax.attention.dense import MASKED
from esolm_jax.attention.kernel_products import dot
from esolm_jax.attention.recompute import pad_to_multiple
from esolm_jax.family.rule import visible as rule
from esolm_jax.sampling.engine import quantize
from esolm_jax.sampling.engine.cache import Heads, KeyValue, Visible

TILE_BYTES = 2**19  # of keys in a tile of slots
PARTS = 8  # tiles of the slots, at least
ROWS, STATE_BYTES = 512, 2**23  # the most rows of the block-diagonal matrix, and of its state
SUBLANES = 8  # sizes of small arrays are multiples
LANES = 128


def fits(heads: Heads) -> bool:
    """Whether the kernel serves this window: the block-diagonal matrix has a row for each group
    and query, and is kept on the chip with the sums of its rows."""
    _, window, groups, more, width = heads.products.shape
    rows = groups * -(-window * (more - 2) // SUBLANES) * SUBLANES
    state = rows * groups * width * (heads.products.dtype.itemsize + 4)
    return rows <= ROWS and state <= STATE_BYTES


def tile_of(slots: int, row_bytes: int) -> int:
    """Slots of a tile: a power of two that divides them, if they are a multiple of 64. On average
    half of the last tile is read without use, so a cache of few slots has smaller tiles."""
    most = max(64, min(TILE_BYTES // row_bytes, max(LANES, slots // PARTS)))
    return math.gcd(slots, 1 << (most.bit_length() - 1))


def attend(
    heads: Heads, visible: Visible, past, *, block: int = 0, interpret: bool = False
) -> tuple[jax.Array, KeyValue]:
    """See KVCache.attend.

    Args:
      past: (keys, values) [N, B, S, G·K] of all blocks, which may be quantized.
      block: index in N.
      interpret: run the kernel in Python, on any device.
    """
    q, k, v = heads.ready()
    batch, groups, per_group, window, width = q.shape
    lanes, queries = groups * width, window * per_group
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    q_BTD = q.transpose(0, 3, 2, 1, 4).reshape(batch, queries, lanes)
    q_BTD, k_BWD, v_BWD = (
        pad_to_multiple(a.reshape(batch, -1, lanes), 1, SUBLANES) for a in (q_BTD, k, v)
    )
    labels = _labels(visible, per_group, groups, k_BWD.shape[1], q_BTD.shape[1])
    (keys, key_scale), (values, value_scale) = map(quantize.split, past)
    scales = () if key_scale is None else (key_scale, value_scale)
    slots = keys.shape[2]
    tile = tile_of(slots, lanes * keys.dtype.itemsize)
    kernel = functools.partial(
        _kernel, groups=groups, width=width, window=window, tile=tile, dtype=v.dtype
    )
    rows = groups * q_BTD.shape[1]

    def of_row(array):
        return pl.BlockSpec((None, *array.shape[1:]), lambda b, j, filled: (b, 0, 0))

    def tile_at(b, j, filled):  # the tile before is not read again
        last = jnp.maximum(filled[b] + tile - 1, tile) // tile - 1
        return block, b, jnp.minimum(j, last), 0

    def scales_at(*indices):
        of_block, row, j, _ = tile_at(*indices)
        return of_block, row, 0, j

    operands = q_BTD, k_BWD, v_BWD, *labels
    of_cache = pl.BlockSpec((None, None, tile, lanes), tile_at)
    of_scale = pl.BlockSpec((None, None, groups, tile), scales_at)
    out_BTD = pl.pallas_call(
        kernel,
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, slots // tile),
            in_specs=[*map(of_row, operands), of_cache, of_cache, *[of_scale] * len(scales)],
            out_specs=of_row(q_BTD),
            scratch_shapes=[
                tpu.VMEM((rows, lanes), v.dtype),
                tpu.VMEM((rows, lanes), jnp.float32),
                tpu.VMEM((rows, LANES), jnp.float32),
                tpu.VMEM((rows, LANES), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_BTD.shape, v.dtype),
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode_attention",
    )(visible.filled, *operands, keys, values, *scales)
    out = out_BTD[:, :queries].reshape(batch, window, per_group, groups, width)
    return jnp.moveaxis(out, 2, 3), (k, v)


def _labels(visible: Visible, per_group: int, groups: int, keys: int, queries: int):
    """int32 ranks and flags of the rows of queries [B, rows, 1] and of the keys [B, 1, W]."""
    found = []
    for label in (visible.rank, visible.in_context.astype(jnp.int32)):
        each = jnp.repeat(label, per_group, axis=1)
        each = jnp.repeat(pad_to_multiple(each, 1, queries), groups, axis=1)
        found += [each[..., None], pad_to_multiple(label, 1, keys)[:, None]]
    return found


def _kernel(filled, *refs, groups: int, width: int, window: int, tile: int, dtype):
    """One tile of slots of one row. The first also prepares the queries and attends to the
    window."""
    q, k, v, q_rank, k_rank, q_in_context, k_in_context, keys, values, *scales = refs
    *scales, out, wide, acc, total, top = scales
    row, j = pl.program_id(0), pl.program_id(1)
    count = filled[row]
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    product = functools.partial(dot, precision=precision)

    @pl.when(j == 0)
    def _start():
        spread = product(_spread(q.shape[0], groups, q.dtype), q[...], 1, 0)
        wide[...] = jnp.where(_own(spread.shape, groups, width), spread, 0.0).astype(wide.dtype)
        acc[...] = jnp.zeros_like(acc)
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, MASKED)
        mask = rule(q_rank[...], q_in_context[...] != 0, k_rank[...], k_in_context[...] != 0)
        there = jax.lax.broadcasted_iota(jnp.int32, mask.shape, 1) < window
        _step(product, wide, acc, total, top, k[...], v[...], mask & there)

    @pl.when(j * tile < count)
    def _tile():
        shape = wide.shape[0], tile
        there = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + j * tile < count
        k_SD, v_SD = keys[...].astype(wide.dtype), values[...].astype(wide.dtype)
        by_row = [_of_rows(scale[...], wide.shape[0]) for scale in scales]
        _step(product, wide, acc, total, top, k_SD, v_SD, there, by_row)

    @pl.when(j == pl.num_programs(1) - 1)
    def _finish():
        divisor = jnp.where(total[:, :1] > 0, total[:, :1], 1.0)  # rows of padding may see nothing
        own = jnp.where(_own(acc.shape, groups, width), acc[...] / divisor, 0.0)
        gather = _spread(q.shape[0], groups, jnp.float32)
        merged = dot(gather, own, 0, 0, precision=jax.lax.Precision.HIGHEST)
        out[...] = merged.astype(out.dtype)


def _of_rows(scale_GS, rows: int):
    """[rows, S]: the scales of the group of each row, by a product: row r is of group r % G."""
    groups = len(scale_GS)
    row, group = (jax.lax.broadcasted_iota(jnp.int32, (rows, groups), axis) for axis in (0, 1))
    own = (jax.lax.rem(row, groups) == group).astype(jnp.float32)
    return dot(own, scale_GS, 1, 0, precision=jax.lax.Precision.HIGHEST)


def _step(product, wide, acc, total, top, k_SD, v_SD, mask, scales=()) -> None:
    """Each tile of keys rescales the running sums. `scales` [rows, S]: of quantized keys and
    values."""
    scores = product(wide[...], k_SD, 1, 1)
    scores = jnp.where(mask, scores * scales[0] if scales else scores, MASKED)
    before = top[:, :1]
    now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
    probs, keep = jnp.where(mask, jnp.exp(scores - now), 0.0), jnp.exp(before - now)
    weights = probs * scales[1] if scales else probs
    acc[...] = acc[...] * keep + product(weights.astype(v_SD.dtype), v_SD, 1, 0)
    total[...] = total[...] * keep + probs.sum(axis=1, keepdims=True)
    top[...] = jnp.broadcast_to(now, top.shape)


def _spread(queries: int, groups: int, dtype):
    """[rows, T]: 1 where a row is of a query; row t · G + g is query t of group g."""
    shape = queries * groups, queries
    row, query = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return (row // groups == query).astype(dtype)


def _own(shape: tuple[int, int], groups: int, width: int):
    """Whether a lane is of the group of its row."""
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return jax.lax.rem(row, groups) == lane // width


def attention_bytes(
    batch: int, slots: int, row_bytes: int, slot_bytes: float, filled: float
) -> float:
    """Bytes of the cache that one execution of the kernel reads at this mean number of filled
    slots: whole tiles.

    Args:
      row_bytes: of the keys of a slot, without scales. slot_bytes: of its keys and values.
    """
    tile = tile_of(slots, row_bytes)
    tiles = min(slots // tile, filled / tile + 0.5)  # the last one is half filled on average
    return batch * max(1.0, tiles) * tile * slot_bytes
