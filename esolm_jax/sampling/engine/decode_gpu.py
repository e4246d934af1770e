"""Attention of a decoding pass as one GPU kernel (Pallas, by way of Triton), without branches.

A program serves one group of heads of one row, for a tile of queries and a part of the filled slots
of the cache. It adds biases, norms and rotates queries and keys, and applies the rule to the
window. The number of filled slots is data: the kernel reads what is filled, and no more. Several
programs share the slots where a GPU has more cores than there are groups; a second kernel then
merges their partial results. Online softmax in float32, exact.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from esolm_jax.attention.dense import MASKED
from esolm_jax.family.rule import visible as rule
from esolm_jax.sampling.engine.cache import Heads, KeyValue, Visible

TILE = 64  # slots that a program reads at a time; and the most queries of a program
MIN_TILE = 16  # Triton multiplies powers of two from this one
PROGRAMS = 264  # to keep a large GPU busy: two for each of 132 cores
MIN_PART = 128  # slots of the cache for each program that shares them, at least


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of one call: R query heads for each of G groups, W tokens of width K, S slots."""

    batch: int
    groups: int
    heads: int
    window: int
    width: int
    slots: int
    norm_eps: float = 0.0

    @classmethod
    def of(cls, heads: Heads, past) -> "Sizes":
        batch, window, groups, more, width = heads.products.shape
        slots = 0 if past is None else past[0].shape[2]
        return cls(batch, groups, more - 2, window, width, slots, heads.config.norm_eps)

    @property
    def queries(self) -> int:
        """Queries of a program: R · W, rounded up, or a tile of them."""
        return min(TILE, max(MIN_TILE, pl.next_power_of_2(self.heads * self.window)))

    @property
    def tiles(self) -> int:
        """Tiles of queries."""
        return -(-self.heads * self.window // self.queries)

    @property
    def parts(self) -> int:
        """Programs that share the slots of the cache."""
        programs = self.batch * self.groups * self.tiles
        most = max(1, self.slots // MIN_PART)
        return min(pl.next_power_of_2(-(-PROGRAMS // programs)), 1 << (most.bit_length() - 1))

    @property
    def half(self) -> int:
        """K / 2, rounded up to what Triton multiplies: rotation pairs the halves of K."""
        return max(MIN_TILE, pl.next_power_of_2(self.width // 2))

    @property
    def columns(self) -> int:
        """K, rounded up."""
        return max(MIN_TILE, pl.next_power_of_2(self.width))


def attend(
    heads: Heads, visible: Visible, past=None, *, block: int = 0, interpret: bool = False
) -> tuple[jax.Array, KeyValue]:
    """See KVCache.attend.

    Args:
      past: (keys, values) [N, B, S, G·K] of all blocks, or None = no slots.
      block: index in N.
      interpret: run the kernels in Python, on any device.
    """
    sizes = Sizes.of(heads, past)
    dtype = heads.products.dtype
    split = sizes.batch, sizes.window, sizes.groups
    out = jax.ShapeDtypeStruct((*split, sizes.heads, sizes.width), dtype)
    pair = [jax.ShapeDtypeStruct((*split, sizes.width), dtype)] * 2
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
        functools.partial(_kernel, sizes, tuple(named)),
        grid=(sizes.tiles * parts, sizes.groups, sizes.batch),
        in_specs=in_specs,
        out_specs=[*specs, *pair_specs],
        out_shape=[*shapes, *pair],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )(*named.values())
    if parts > 1:
        found = [_merge(sizes, interpret, found, out)]
    return found[0], (keys, values)


def _operands(sizes: Sizes, heads: Heads, visible: Visible, past, block: int):
    """(operands of the kernel by name, their specs). Programs are (tile and part, group, row)."""
    width, window, rows = sizes.width, sizes.window, heads.products.shape[3]
    of_row = pl.BlockSpec((None, window), lambda i, g, b: (b, 0))
    of_angle = pl.BlockSpec((None, window, width), lambda i, g, b: (b, 0, 0))
    of_cache = pl.BlockSpec((None, None, sizes.slots, width), lambda i, g, b: (block, b, 0, g))
    keys, values = past or (None, None)
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


def _kernel(sizes: Sizes, names: tuple[str, ...], *refs):
    """One tile of queries over one part of the slots; the first part also over the window."""
    named, (*out, keys, values) = dict(zip(names, refs, strict=False)), refs[len(names) :]
    part = jax.lax.rem(pl.program_id(0), sizes.parts)
    tile = jax.lax.div(pl.program_id(0), sizes.parts)
    token, head = _places(sizes, tile)
    q = _heads_of(sizes, named, token, head)
    labels = _labels(sizes, named, token)
    carry = (
        jnp.zeros((sizes.queries, sizes.columns), jnp.float32),
        jnp.zeros(sizes.queries, jnp.float32),
        jnp.full(sizes.queries, MASKED, jnp.float32),
    )
    carry = _over_window(sizes, named, q, labels, part, tile, (keys, values), carry)
    if "keys" in named:
        carry = _over_cache(sizes, named, q, part, carry)
    out_TK, total, top = carry
    if sizes.parts == 1:
        _store(sizes, tile, out[0], out_TK / total[:, None])
    else:
        for ref, array in zip(out, (out_TK, total[:, None], top[:, None]), strict=True):
            ref[...] = array


def _over_window(sizes: Sizes, named, q, q_labels, part, tile, pair, carry):
    """The step of the online softmax over the window; stores its keys and values."""
    tokens = min(TILE, max(MIN_TILE, pl.next_power_of_2(sizes.window)))
    q_rank, q_in_context = (label[:, None] for label in q_labels)
    stores = (part == 0) & (tile == 0)

    def step(i, carry):
        at = i * tokens + jnp.arange(tokens)
        there = at < sizes.window
        head = jnp.full_like(at, sizes.heads)
        k = _heads_of(sizes, named, at, head)
        v_SK = _summed(sizes, named, at, head + 1, *_columns(sizes))
        k_rank, k_in_context = (label[None] for label in _labels(sizes, named, at))
        mask = rule(q_rank, q_in_context != 0, k_rank, k_in_context != 0) & there[None]
        keys, values = pair
        for low, half in zip((0, sizes.width // 2), k, strict=True):
            column = jnp.arange(sizes.half)
            exists = there[:, None] & (column < sizes.width // 2)[None] & stores
            triton.store(keys.at[at[:, None], low + column[None]], half, mask=exists)
        column, exists = _columns(sizes)
        exists = there[:, None] & exists[None] & stores
        triton.store(values.at[at[:, None], column[None]], v_SK, mask=exists)
        return _softmax_step(carry, q, k, v_SK, mask)

    of_first = 1 - jnp.minimum(part, 1)  # Triton takes no boolean as a bound
    return jax.lax.fori_loop(0, -(-sizes.window // tokens) * of_first, step, carry)


def _over_cache(sizes: Sizes, named, q, part, carry):
    """The steps of the online softmax over this part of the filled slots."""
    count = named["filled"][0]
    each = jax.lax.div(count + sizes.parts * TILE - 1, sizes.parts * TILE) * TILE
    low = jnp.minimum(part * each, count)
    high = jnp.minimum(low + each, count)

    def step(i, carry):
        at = low + i * TILE + jnp.arange(TILE)
        there = at < high
        column = jnp.arange(sizes.half)
        exists = there[:, None] & (column < sizes.width // 2)[None]
        k = [
            triton.load(named["keys"].at[at[:, None], first + column[None]], mask=exists, other=0)
            for first in (0, sizes.width // 2)
        ]
        column, exists = _columns(sizes)
        exists = there[:, None] & exists[None]
        v_SK = triton.load(named["values"].at[at[:, None], column[None]], mask=exists, other=0)
        return _softmax_step(carry, q, k, v_SK, there[None])

    return jax.lax.fori_loop(0, jax.lax.div(high - low + TILE - 1, TILE), step, carry)


def _softmax_step(carry, q, k, v_SK, mask):
    """Each tile of keys rescales the running sums."""
    out_TK, total, top_before = carry
    scores = _dot(q[0], k[0], 1, 1) + _dot(q[1], k[1], 1, 1)
    scores = jnp.where(mask, scores, MASKED)
    top = jnp.maximum(top_before, scores.max(axis=1))
    probs, keep = jnp.exp(scores - top[:, None]), jnp.exp(top_before - top)
    probs = jnp.where(mask, probs, 0.0)
    out_TK = out_TK * keep[:, None] + _dot(probs.astype(v_SK.dtype), v_SK, 1, 0)
    return out_TK, total * keep + probs.sum(axis=1), top


def _dot(a, b, contract_a: int, contract_b: int):
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _places(sizes: Sizes, tile):
    """(token, query head) of each query of a tile; beyond the window for padding."""
    query = tile * sizes.queries + jnp.arange(sizes.queries)
    return jax.lax.div(query, sizes.heads), jax.lax.rem(query, sizes.heads)


def _columns(sizes: Sizes):
    """(indices of the columns, which of them exist)."""
    column = jnp.arange(sizes.columns)
    return column, column < sizes.width


def _labels(sizes: Sizes, named, token):
    """(rank, in context) of tokens; 0 for padding."""
    there = token < sizes.window
    return [
        triton.load(named[name].at[token], mask=there, other=0) for name in ("rank", "in_context")
    ]


def _summed(sizes: Sizes, named, token, head, column, exists):
    """Products with biases at these columns, in the dtype of the products; 0 for padding."""
    mask = (token < sizes.window)[:, None] & exists[None]
    index = token[:, None], head[:, None], column[None]
    products = triton.load(named["products"].at[index], mask=mask, other=0)
    if "bias" not in named:
        return products
    bias = triton.load(named["bias"].at[index[1:]], mask=mask, other=0)
    summed = products.astype(jnp.float32) + bias.astype(products.dtype).astype(jnp.float32)
    return summed.astype(products.dtype)


def _heads_of(sizes: Sizes, named, token, head):
    """Both halves of queries or keys, ready to attend; [tokens, half] each."""
    column, width = jnp.arange(sizes.half), sizes.width // 2
    exists = column < width
    places = (column, width + column)
    halves = [_summed(sizes, named, token, head, place, exists) for place in places]
    dtype = halves[0].dtype
    mask = (token < sizes.window)[:, None] & exists[None]
    low, high = (half.astype(jnp.float32) for half in halves)
    if "scale" in named:
        squares = (low * low).sum(axis=1) + (high * high).sum(axis=1)
        factor = jax.lax.rsqrt(squares / sizes.width + sizes.norm_eps)[:, None]
        scales = (
            triton.load(named["scale"].at[head[:, None], place[None]], mask=mask, other=0)
            for place in places
        )
        low, high = (
            (half * factor * scale).astype(dtype).astype(jnp.float32)
            for half, scale in zip((low, high), scales, strict=True)
        )
    if "cos" in named:
        cos, sin = (  # of the second half: the sine of the first is negative
            triton.load(named[name].at[token[:, None], places[1][None]], mask=mask, other=0)
            for name in ("cos", "sin")
        )
        low, high = low * cos - high * sin, high * cos + low * sin
    return low.astype(dtype), high.astype(dtype)


def _store(sizes: Sizes, tile, ref, out_TK) -> None:
    token, head = _places(sizes, tile)
    column, exists = _columns(sizes)
    mask = (token < sizes.window)[:, None] & exists[None]
    where = token[:, None], head[:, None], column[None]
    triton.store(ref.at[where], out_TK.astype(ref.dtype), mask=mask)


def _merge_kernel(sizes: Sizes, out, total, top, merged):
    """Adds up the parts of one tile of queries."""
    top_PT = top[...][:, :, 0]
    keep = jnp.exp(top_PT - top_PT.max(axis=0)[None])
    out_TK = (out[...] * keep[:, :, None]).sum(axis=0)
    total_T = (total[...][:, :, 0] * keep).sum(axis=0)
    _store(sizes, pl.program_id(0), merged, out_TK / total_T[:, None])


def _merge(sizes: Sizes, interpret: bool, parts, out: jax.ShapeDtypeStruct):
    specs = [
        pl.BlockSpec(
            (sizes.parts, None, None, sizes.queries, part.shape[-1]),
            lambda i, g, b: (0, b, g, i, 0),
        )
        for part in parts
    ]
    return pl.pallas_call(
        functools.partial(_merge_kernel, sizes),
        grid=(sizes.tiles, sizes.groups, sizes.batch),
        in_specs=specs,
        out_specs=_out_spec(sizes),
        out_shape=out,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="decode_merge",
    )(*parts)


def attention_bytes(sizes: Sizes, itemsize: int, filled: float) -> float:
    """Bytes that one execution of the first kernel reads and writes at this mean number of filled
    slots of each row. What several tiles of queries read counts once each."""
    per_slot = sizes.batch * sizes.groups * sizes.width * itemsize
    window = (2 * sizes.heads + 4) * sizes.window  # queries, outputs; keys and values in and out
    slots = 2 * math.ceil(filled) * sizes.tiles if sizes.slots else 0
    return (slots + window) * per_slot + _partial_bytes(sizes)


def _partial_bytes(sizes: Sizes) -> float:
    if sizes.parts == 1:
        return 0.0
    rows = sizes.parts * sizes.batch * sizes.groups * sizes.tiles * sizes.queries
    return 4.0 * rows * (sizes.columns + 2)
