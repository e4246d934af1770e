"""Attention of a decoding pass as one GPU kernel (Pallas, by way of Triton), without branches.

A program serves one group of heads of one row, for a tile of queries and a part of the filled slots
of the cache. It adds biases, norms and rotates queries and keys, and applies the rule to the
window. The number of filled slots is data: the kernel reads what is filled, and no more. Several
programs share the slots where a GPU has more cores than there are groups; a second kernel then
merges their partial results. Online softmax in float32, exact.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from esolm_jax.sampling.engine.cache import Heads, KeyValue, Visible
from esolm_jax.sampling.engine.decode_gpu_kernels import (
    TILE,
    Sizes,
    attention_kernel,
    merge_kernel,
)
from esolm_jax.sampling.engine.quantize import split

AHEAD = 64 * 1024  # bytes of slots that a program loads ahead


def attend(
    heads: Heads, visible: Visible, past=None, *, block: int = 0, interpret: bool = False
) -> tuple[jax.Array, KeyValue]:
    """See KVCache.attend.

    Args:
      past: (keys, values) [N, B, S, G·K] of all blocks, which may be quantized, or None = no
        slots.
      block: index in N.
      interpret: run the kernels in Python, on any device.
    """
    sizes = Sizes.of(heads, past)
    dtype = heads.products.dtype
    per_group = sizes.batch, sizes.window, sizes.groups
    out = jax.ShapeDtypeStruct((*per_group, sizes.heads, sizes.width), dtype)
    pair = [jax.ShapeDtypeStruct((*per_group, sizes.width), dtype)] * 2
    pair_specs = [
        pl.BlockSpec((None, sizes.window, None, sizes.width), lambda i, g, b: (b, 0, g, 0))
    ] * 2
    rows, parts = sizes.tiles * sizes.queries, sizes.parts
    if parts == 1:
        shapes, specs = [out], [_out_spec(sizes)]
    else:
        shapes = [
            jax.ShapeDtypeStruct((parts, sizes.batch, sizes.groups, rows, columns), jnp.float32)
            for columns in (sizes.columns, 1, 1)
        ]
        specs = [_part_spec(sizes, shape.shape[-1]) for shape in shapes]
    named, in_specs = _operands(sizes, heads, visible, past, block)
    *found, keys, values = pl.pallas_call(
        functools.partial(attention_kernel, sizes, tuple(named)),
        grid=(sizes.tiles * parts, sizes.groups, sizes.batch),
        in_specs=in_specs,
        out_specs=[*specs, *pair_specs],
        out_shape=[*shapes, *pair],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=_stages(sizes, past)),
        interpret=interpret,
        name="decode_attention",
    )(*named.values())
    if parts > 1:
        found = [_merge(sizes, interpret, found, out)]
    return found[0], (keys, values)


def _stages(sizes: Sizes, past) -> int:
    """Of the kernel's loops: with three, the slots of two tiles are on their way while a third is
    computed. As far as they fit the shared memory of every GPU; a window of several tiles takes as
    much."""
    tile = 0 if past is None else 2 * TILE * sizes.width * split(past[0])[0].dtype.itemsize
    return 3 if sizes.window <= TILE and 2 * tile <= AHEAD else 2


def _operands(sizes: Sizes, heads: Heads, visible: Visible, past, block: int):
    """(operands of the kernel by name, their specs). Programs are (tile and part, group, row)."""
    width, window, rows = sizes.width, sizes.window, heads.products.shape[3]
    of_row = pl.BlockSpec((None, window), lambda i, g, b: (b, 0))
    of_angle = pl.BlockSpec((None, window, width), lambda i, g, b: (b, 0, 0))
    of_cache = pl.BlockSpec((None, None, sizes.slots, width), lambda i, g, b: (block, b, 0, g))
    of_scale = pl.BlockSpec((None, None, None, sizes.slots), lambda i, g, b: (block, b, g, 0))
    (keys, key_scale), (values, value_scale) = map(split, past or (None, None))
    all_named = {
        "filled": (visible.filled, pl.BlockSpec((1,), lambda i, g, b: (b,))),
        "rank": (visible.rank, of_row),
        "in_context": (visible.in_context.astype(jnp.int32), of_row),  # no booleans in a kernel
        "products": (
            heads.products,
            pl.BlockSpec((None, window, None, rows, width), lambda i, g, b: (b, 0, g, 0, 0)),
        ),
        "bias": (heads.bias, pl.BlockSpec((None, rows, width), lambda i, g, b: (g, 0, 0))),
        "scale": (heads.scale, pl.BlockSpec((rows - 1, width), lambda i, g, b: (0, 0))),
        "cos": (heads.cos, of_angle),
        "sin": (heads.sin, of_angle),
        "keys": (keys, of_cache),
        "values": (values, of_cache),
        "key_scale": (key_scale, of_scale),
        "value_scale": (value_scale, of_scale),
    }
    given = {name: pair for name, pair in all_named.items() if pair[0] is not None}
    return {name: a for name, (a, _) in given.items()}, [spec for _, spec in given.values()]


def _out_spec(sizes: Sizes) -> pl.BlockSpec:
    return pl.BlockSpec(
        (None, sizes.window, None, sizes.heads, sizes.width), lambda i, g, b: (b, 0, g, 0, 0)
    )


def _part_spec(sizes: Sizes, columns: int) -> pl.BlockSpec:
    return pl.BlockSpec(
        (None, None, None, sizes.queries, columns),
        lambda i, g, b: (i % sizes.parts, b, g, i // sizes.parts, 0),
    )


def _merge(sizes: Sizes, interpret: bool, parts, out: jax.ShapeDtypeStruct):
    specs = [
        pl.BlockSpec(
            (sizes.parts, None, None, sizes.queries, part.shape[-1]),
            lambda i, g, b: (0, b, g, i, 0),
        )
        for part in parts
    ]
    return pl.pallas_call(
        functools.partial(merge_kernel, sizes),
        grid=(sizes.tiles, sizes.groups, sizes.batch),
        in_specs=specs,
        out_specs=_out_spec(sizes),
        out_shape=out,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="decode_merge",
    )(*parts)


def attention_bytes(sizes: Sizes, itemsize: int, slot_bytes: float, filled: float) -> float:
    """Bytes that one execution of the first kernel reads and writes at this mean number of filled
    slots of each row. What several tiles of queries read counts once each.

    Args:
      itemsize: bytes of a number of the window. slot_bytes: of the keys and values of a slot.
    """
    window = (2 * sizes.heads + 4) * sizes.window  # queries, outputs; keys and values in and out
    window_bytes = window * sizes.batch * sizes.groups * sizes.width * itemsize
    slots = math.ceil(filled) * sizes.tiles * sizes.batch if sizes.slots else 0
    return slots * slot_bytes + window_bytes + _partial_bytes(sizes)


def _partial_bytes(sizes: Sizes) -> float:
    if sizes.parts == 1:
        return 0.0
    rows = sizes.parts * sizes.batch * sizes.groups * sizes.tiles * sizes.queries
    return 4.0 * rows * (sizes.columns + 2)
