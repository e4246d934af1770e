"""Attention as a block-sparse TPU kernel (splash attention), for labels that follow from a layout.

Which blocks have anything visible is known when tracing: the others are not even loaded, and the
rule is computed inside the kernel from the indices. Labels that differ from the layout's are
padding, kept apart from the rest by segments.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from esolm_jax.attention.recompute import pad_to_multiple
from esolm_jax.family.labels import Layout
from esolm_jax.family.rule import layout_mask, visible

BLOCKS = (512, 256, 128)
WASTE = 1.6  # large blocks are quick, but compute more pairs than are visible
FUSED_BLOCKS = 8
PADDING, REAL, BEYOND = 0, 1, 2  # segments; BEYOND: keys that only fill the last block


def splash(
    q_BHTK,
    k_BGSK,
    v_BGSK,
    q_rank,
    q_in_context,
    k_rank,
    k_in_context,
    *,
    layout: Layout,
    across: str | None = None,
    interpret: bool = False,
):
    """attention.attend over labels of this layout.

    Args:
      q_BHTK: all queries of the layout, or this device's part of them.
      layout: its M + L is S.
      across: inside shard_map, the mesh axis that the queries are split over.
      interpret: run the kernel in Python, on any device.

    Returns [B, H, T, K] in the dtype of v. Raises ValueError if S is not the layout's.
    """
    length, num_keys = q_BHTK.shape[2], k_BGSK.shape[2]
    if num_keys != layout.queries + layout.length:
        raise ValueError(f"{num_keys} keys do not fit {layout}")
    parts = num_keys // length
    tiles = tiling(layout, parts)
    if front := tiles.layout.queries - layout.queries:  # more query copies, read by nobody

        def lead(array, axis):
            widths = [(front, 0) if i == axis else (0, 0) for i in range(array.ndim)]
            return jnp.pad(array, widths)

        rank, in_context = tiles.layout.labels(jnp.arange(front)[None])
        labels = [
            jnp.concatenate([jnp.broadcast_to(new, (len(old), front)), old], axis=1)
            for new, old in zip((rank, in_context) * 2, (q_rank, q_in_context) * 2, strict=True)
        ]
        qkv = (lead(a, 2) for a in (q_BHTK, k_BGSK, v_BGSK))
        return splash(*qkv, *labels, layout=tiles.layout, interpret=interpret)[:, :, front:]
    kernel = _kernel(layout, parts, q_BHTK.shape[1], interpret)
    index = jnp.arange(length)
    if across:
        part = jax.lax.axis_index(across)
        index += part * length
        kernel = _part_of(kernel, part, parts)
    fill_q = functools.partial(pad_to_multiple, block=tiles.block_q, mode="edge")
    fill_k = functools.partial(pad_to_multiple, block=tiles.block_k)
    k_segment = _segment(k_rank, layout, jnp.arange(num_keys))
    segments = splash_attention_kernel.SegmentIds(
        q=fill_q(_segment(q_rank, layout, index), 1),
        kv=fill_k(k_segment, 1, constant_values=BEYOND),
    )
    # Queries that only fill the last block repeat the last one: none is without a key.
    q_BHTK = fill_q(q_BHTK * q_BHTK.shape[-1] ** -0.5, 2)
    k_BGSK, v_filled = fill_k(k_BGSK, 2), fill_k(v_BGSK, 2)
    out = jax.vmap(kernel)(q_BHTK, k_BGSK, v_filled, segments)
    return out[:, :, :length].astype(v_BGSK.dtype)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a layout is cut into blocks.

    Attributes:
      layout: with more query copies in front where that brings both streams on block boundaries.
      block_q, block_k: tokens of a block. num_q, num_k: tokens, a part's, filled up to blocks.
      blocks: how many blocks, of all parts, hold a visible pair: what the kernel computes.
      fused: one backward kernel makes all gradients, of 5 products for 7. It keeps dq of every
        block of keys apart, so it is for few of them.
    """

    layout: Layout
    block_q: int
    block_k: int
    num_q: int
    num_k: int
    blocks: int
    fused: bool


@functools.lru_cache(maxsize=256)
def tiling(layout: Layout, parts: int = 1) -> Tiling:
    """The largest blocks with at most WASTE times the visible pairs in them."""
    visible_pairs = _num_pairs(layout)
    for block in BLOCKS:
        wide = layout
        if parts == 1 and layout.length % block == 0:
            queries = -(-layout.queries // block) * block
            wide = Layout(layout.length, queries, layout.block)
        num_q, num_k = (
            -(-n // block) * block
            for n in ((wide.queries + wide.length) // parts, wide.queries + wide.length)
        )
        blocks = _visible_blocks(wide, parts, num_q, num_k, block)
        if blocks * block**2 <= WASTE * visible_pairs or block == BLOCKS[-1]:
            few = num_k // block <= FUSED_BLOCKS and parts == 1
            return Tiling(wide, block, block, num_q, num_k, blocks, few)
    raise AssertionError("BLOCKS is empty")


def _num_pairs(layout: Layout) -> int:
    """Visible pairs of a layout."""
    context = np.arange(layout.length)
    rank = context // layout.block
    same = np.bincount(rank[layout.length - layout.queries :], minlength=rank[-1] + 1)
    seen = np.minimum((rank + 1) * layout.block, layout.length).sum()
    copies = rank[layout.length - layout.queries :]
    return int(seen + (copies * layout.block + same[copies]).sum())


def _visible_blocks(layout: Layout, parts: int, num_q: int, num_k: int, block: int) -> int:
    size = layout.queries + layout.length
    mask = _LayoutMask(layout, _q_index(size, parts, num_q), num_k)
    edges_q, edges_k = range(0, parts * num_q, block), range(0, num_k, block)
    return sum(
        int(mask[slice(i, i + block), slice(j, j + block)].any()) for i in edges_q for j in edges_k
    )


def _q_index(size: int, parts: int, num_q: int) -> np.ndarray:
    """Index of the query in each row of all parts; the last one of a part fills it up."""
    index = np.arange(size, dtype=np.int32).reshape(parts, -1)
    return np.pad(index, ((0, 0), (0, num_q - index.shape[1])), mode="edge").reshape(-1)


def _segment(rank_BT, layout, index):
    return jnp.where(rank_BT == layout.labels(index)[0][None], REAL, PADDING)


class _LayoutMask(splash_attention_mask.Mask):
    """The rule of a layout, by index. Some rows may repeat one query."""

    def __init__(self, layout: Layout, q_index: np.ndarray, num_keys: int):
        self.q_sequence = q_index
        self.mask_function = _mask_function(layout)
        self._layout, self._num_keys = layout, num_keys
        self._seen = {}

    @property
    def shape(self):
        return len(self.q_sequence), self._num_keys

    def __getitem__(self, at):
        """A stand-in for a block of the mask: whether anything is visible is all that is read of
        it, for the kernel computes the mask. (Never wholly visible: the library cannot join the
        tables of several parts if there are no other blocks.)"""
        rows, columns = at
        span = rows.start, rows.stop, columns.start, columns.stop
        if span not in self._seen:
            q_index, k_index = self.q_sequence[rows], np.arange(columns.start, columns.stop)
            self._seen[span] = layout_mask(self._layout, q_index, k_index).any()
        mask = np.zeros((rows.stop - rows.start, columns.stop - columns.start), bool)
        mask[0, 0] = self._seen[span]
        return mask


@functools.lru_cache(maxsize=64)
def _mask_function(layout: Layout):
    """The rule for the kernel: one function object per layout, as jit compares them."""
    return lambda q_index, k_index: visible(*layout.labels(q_index), *layout.labels(k_index))


@functools.lru_cache(maxsize=64)
def _kernel(layout: Layout, parts: int, heads: int, interpret: bool):
    """The kernel for all parts that the queries are split into."""
    tiles = tiling(layout, parts)
    sizes = {"block_q": tiles.block_q, "block_kv": tiles.block_k}
    sizes |= {"block_q_dkv": tiles.block_q, "block_kv_dkv": tiles.block_k}
    if not tiles.fused:
        sizes |= {"block_q_dq": tiles.block_q, "block_kv_dq": tiles.block_k}
    blocks = splash_attention_kernel.BlockSizes(**sizes, use_fused_bwd_kernel=tiles.fused)
    q_index = _q_index(layout.queries + layout.length, parts, tiles.num_q)
    mask = _LayoutMask(layout, q_index, tiles.num_k)
    with jax.ensure_compile_time_eval():
        return splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * heads),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=parts,
            residual_checkpoint_name="attention",  # for model.REMAT
            interpret=interpret,
        )


def _part_of(kernel, part, parts: int):
    """The kernel for one part of the queries, given by its (traced) number."""

    def own(table):
        axis = table.ndim - 2 if table.ndim == 3 else 0  # [1, queries, keys] or [queries]
        size = table.shape[axis] // parts
        return jax.lax.dynamic_slice_in_dim(table, part * size, size, axis)

    return jax.tree.map(own, kernel)
