"""The GPU kernels of decode_gpu.py: what one program computes.

Operands come by name, because a model may lack some: `filled`, `rank`, `in_context`, `products`,
`bias`, `scale`, `cos`, `sin`, `keys`, `values`, `key_scale`, `value_scale`; see Heads, Visible and
KernelCache.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from esolm_jax.attention.dense import MASKED
from esolm_jax.attention.kernel_products import add, dot, padded
from esolm_jax.family.rule import visible as rule
from esolm_jax.sampling.engine.cache import Heads

TILE = 64  # slots that a program reads at a time; and the most queries of a program
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
        return min(TILE, padded(self.heads * self.window))

    @property
    def window_tile(self) -> int:
        """Keys of the window at a time."""
        return min(TILE, padded(self.window))

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
        return padded(self.width // 2)

    @property
    def columns(self) -> int:
        """K, rounded up."""
        return padded(self.width)


def attention_kernel(sizes: Sizes, names: tuple[str, ...], *refs):
    """One tile of queries over one part of the slots; the last part, which has the fewest filled
    ones, also over the window.

    What can be loaded is loaded first: no load passes a barrier of the threads, and a program alone
    on its core would wait for each load in turn.
    """
    named, (*out, keys, values) = dict(zip(names, refs, strict=False)), refs[len(names) :]
    part = jax.lax.rem(pl.program_id(0), sizes.parts)
    tile = jax.lax.div(pl.program_id(0), sizes.parts)
    count = named["filled"][0]
    token, head = _places(sizes, tile)

    def load():
        heads, labels = _load_heads(sizes, named, token, head), _labels(sizes, named, token)
        return heads, labels, _load_window(sizes, named, 0)

    loaded, labels, first = _together(load)
    q = _heads_of(sizes, loaded)
    carry = (
        jnp.zeros((sizes.queries, sizes.columns), jnp.float32),
        jnp.zeros(sizes.queries, jnp.float32),
        jnp.full(sizes.queries, MASKED, jnp.float32),
    )
    carry = _over_window(sizes, named, first, q, labels, part, tile, (keys, values), carry)
    if "keys" in named:
        carry = _over_cache(sizes, named, q, part, count, carry)
    out_TK, total, top = carry
    if sizes.parts == 1:
        _store(sizes, tile, out[0], out_TK / total[:, None])
    else:
        for ref, array in zip(out, (out_TK, total[:, None], top[:, None]), strict=True):
            ref[...] = array


def _together(load: Callable):
    """The results of load(), whose loads wait for memory at the same time. Outside of a branch,
    Triton puts the conversion of each to the layout of a product, and with it a barrier, right
    behind its load."""
    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(load))
    always = sum(pl.program_id(axis) for axis in range(3)) < 2**30  # but no compiler knows that
    return jax.lax.cond(always, load, lambda: nothing)


def _over_window(sizes: Sizes, named, first, q, q_labels, part, tile, pair, carry):
    """The steps of the online softmax over the window; stores its keys and values. `first`: what
    the first step loads."""
    q_rank, q_in_context = (label[:, None] for label in q_labels)
    others = sizes.parts - 1 - part
    stores = (others == 0) & (tile == 0)

    def step(i, carry):
        at, loaded, loaded_values, labels = first if steps == 1 else _load_window(sizes, named, i)
        there = at < sizes.window
        k, v_SK = _heads_of(sizes, loaded), _sum(*loaded_values)
        k_rank, k_in_context = (label[None] for label in labels)
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

    steps = -(-sizes.window // sizes.window_tile)
    of_last = 1 - jnp.minimum(others, 1)  # Triton takes no boolean as a bound
    return jax.lax.fori_loop(0, steps * of_last, step, carry)


def _load_window(sizes: Sizes, named, i):
    """The i-th tile of the window: its tokens; keys, values and labels, as loaded."""
    at = i * sizes.window_tile + jnp.arange(sizes.window_tile)
    head = jnp.full_like(at, sizes.heads)
    values = _load_products(sizes, named, at, head + 1, *_columns(sizes))
    return at, _load_heads(sizes, named, at, head), values, _labels(sizes, named, at)


def _over_cache(sizes: Sizes, named, q, part, count, carry):
    """The steps of the online softmax over this part of the filled slots, `count` in all."""
    each = jax.lax.div(count + sizes.parts * TILE - 1, sizes.parts * TILE) * TILE
    low = jnp.minimum(part * each, count)
    high = jnp.minimum(low + each, count)

    def step(i, carry):
        at = low + i * TILE + jnp.arange(TILE)
        there = at < high
        column = jnp.arange(sizes.half)
        exists = there[:, None] & (column < sizes.width // 2)[None]
        k = [
            triton.load(named["keys"].at[at[:, None], first + column[None]], mask=exists, other=0.0)
            for first in (0, sizes.width // 2)
        ]
        column, exists = _columns(sizes)
        exists = there[:, None] & exists[None]
        v_SK = triton.load(named["values"].at[at[:, None], column[None]], mask=exists, other=0.0)
        k, v_SK = [half.astype(q[0].dtype) for half in k], v_SK.astype(q[0].dtype)
        scales = [
            triton.load(named[name].at[at], mask=there, other=0)[None]
            for name in ("key_scale", "value_scale")
            if name in named
        ]
        return _softmax_step(carry, q, k, v_SK, there[None], scales)

    return jax.lax.fori_loop(0, jax.lax.div(high - low + TILE - 1, TILE), step, carry)


def _softmax_step(carry, q, k, v_SK, mask, scales=()):
    """Each tile of keys rescales the running sums.

    Args:
      scales: of quantized keys and values, [1, S] each.
    """
    out_TK, total, top_before = carry
    scores = dot(q[0], k[0], 1, 1) + dot(q[1], k[1], 1, 1)
    scores = scores * scales[0] if scales else scores
    scores = jnp.where(mask, scores, MASKED)
    top = jnp.maximum(top_before, scores.max(axis=1))
    probs, keep = jnp.exp(scores - top[:, None]), jnp.exp(top_before - top)
    probs = jnp.where(mask, probs, 0.0)
    weights = probs * scales[1] if scales else probs
    out_TK = out_TK * keep[:, None] + dot(weights.astype(v_SK.dtype), v_SK, 1, 0)
    return out_TK, total * keep + probs.sum(axis=1), top


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


def _load_products(sizes: Sizes, named, token, head, column, exists):
    """[products, and their bias where the model has one] at these columns; 0 for padding."""
    mask = (token < sizes.window)[:, None] & exists[None]
    index = token[:, None], head[:, None], column[None]
    at = {"products": index, "bias": index[1:]}
    return [triton.load(named[n].at[at[n]], mask=mask, other=0) for n in at if n in named]


def _sum(products, bias=None):
    """In the dtype of the products."""
    return products if bias is None else add(products, bias)


def _load_heads(sizes: Sizes, named, token, head):
    """Queries or keys as loaded: (products of both halves; scales of both; cosine and sine)."""
    column, width = jnp.arange(sizes.half), sizes.width // 2
    exists, places = column < width, (column, width + column)
    mask = (token < sizes.window)[:, None] & exists[None]

    def load(name, row, place):
        return triton.load(named[name].at[row[:, None], place[None]], mask=mask, other=0)

    halves = [_load_products(sizes, named, token, head, place, exists) for place in places]
    scales = [load("scale", head, place) for place in places if "scale" in named]
    # Of the second half: the sine of the first is negative.
    angles = [load(name, token, places[1]) for name in ("cos", "sin") if name in named]
    return halves, scales, angles


def _heads_of(sizes: Sizes, loaded):
    """Both halves of queries or keys, ready to attend; [tokens, half] each."""
    halves, scales, angles = loaded
    dtype = halves[0][0].dtype
    low, high = (_sum(*half).astype(jnp.float32) for half in halves)
    if scales:
        squares = (low * low).sum(axis=1) + (high * high).sum(axis=1)
        factor = jax.lax.rsqrt(squares / sizes.width + sizes.norm_eps)[:, None]
        low, high = (
            (half * factor * scale).astype(dtype).astype(jnp.float32)
            for half, scale in zip((low, high), scales, strict=True)
        )
    if angles:
        cos, sin = angles
        low, high = low * cos - high * sin, high * cos + low * sin
    return low.astype(dtype), high.astype(dtype)


def _store(sizes: Sizes, tile, ref, out_TK) -> None:
    token, head = _places(sizes, tile)
    column, exists = _columns(sizes)
    mask = (token < sizes.window)[:, None] & exists[None]
    where = token[:, None], head[:, None], column[None]
    triton.store(ref.at[where], out_TK.astype(ref.dtype), mask=mask)


def merge_kernel(sizes: Sizes, out, total, top, merged):
    """Adds up the parts of one tile of queries."""
    out_PTK, total_PT, top_PT = out[...], total[...][:, :, 0], top[...][:, :, 0]
    keep = jnp.exp(top_PT - top_PT.max(axis=0)[None])
    out_TK = (out_PTK * keep[:, :, None]).sum(axis=0)
    _store(sizes, pl.program_id(0), merged, out_TK / (total_PT * keep).sum(axis=0)[:, None])
