"""Attention as a block-sparse TPU kernel (splash attention), for labels that follow from a layout.

The mask of visible blocks is known at trace time; the kernel skips the others and computes the rule
from the indices. Labels that differ from the layout's are padding, which segment ids separate from
the rest.
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
MAX_WASTE = 1.6  # computed pairs per visible pair; large blocks are faster but waste more
MAX_FUSED_BLOCKS = 8  # of keys; the fused backward kernel holds a dq for each
PADDING, REAL, BEYOND = 0, 1, 2  # segment ids; BEYOND: keys added to complete the last block


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
    """Attention over labels of this layout; see `attend`.

    Args:
      q_BHTK: all queries of the layout, or this device's shard of them.
      layout: its M + L is S.
      across: inside shard_map, the mesh axis over which the queries are sharded.
      interpret: run the kernel in Python, on any device.

    Returns [B, H, T, K] in the dtype of v. Raises ValueError if S is not the layout's.
    """
    length, num_keys = q_BHTK.shape[2], k_BGSK.shape[2]
    if num_keys != layout.queries + layout.length:
        raise ValueError(
            f"S={num_keys}: must be {layout.queries + layout.length}, because the layout is "
            f"{layout}"
        )
    shards = num_keys // length
    tiles = tiling(layout, shards)
    if front := tiles.layout.queries - layout.queries:  # extra query copies, which no token reads

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
    kernel = _kernel(layout, shards, q_BHTK.shape[1], interpret)
    index = jnp.arange(length)
    if across:
        shard = jax.lax.axis_index(across)
        index += shard * length
        kernel = _shard_of(kernel, shard, shards)
    pad_q = functools.partial(pad_to_multiple, block=tiles.block_q, mode="edge")
    pad_k = functools.partial(pad_to_multiple, block=tiles.block_k)
    k_segment = _segment(k_rank, layout, jnp.arange(num_keys))
    segments = splash_attention_kernel.SegmentIds(
        q=pad_q(_segment(q_rank, layout, index), 1),
        kv=pad_k(k_segment, 1, constant_values=BEYOND),
    )
    # Queries added to complete the last block repeat the last one, so that each sees a key.
    q_BHTK = pad_q(q_BHTK * q_BHTK.shape[-1] ** -0.5, 2)
    k_BGSK, v_padded = pad_k(k_BGSK, 2), pad_k(v_BGSK, 2)
    out = jax.vmap(kernel)(q_BHTK, k_BGSK, v_padded, segments)
    return out[:, :, :length].astype(v_BGSK.dtype)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A layout in blocks.

    Attributes:
      layout: with extra query copies in front if these align both streams with the blocks.
      block_q, block_k: tokens of a block.
      num_q, num_k: queries of a shard and keys, padded to whole blocks.
      blocks: the number of blocks with a visible pair, over all shards: those that are computed.
      fused: one backward kernel computes all gradients, with 5 matmuls instead of 7. It holds a
        separate dq for each block of keys.
    """

    layout: Layout
    block_q: int
    block_k: int
    num_q: int
    num_k: int
    blocks: int
    fused: bool


@functools.lru_cache(maxsize=256)
def tiling(layout: Layout, shards: int = 1) -> Tiling:
    """The largest blocks with at most MAX_WASTE computed pairs per visible pair."""
    visible_pairs = _num_pairs(layout)
    for block in BLOCKS:
        wide = layout
        if shards == 1 and layout.length % block == 0:
            queries = -(-layout.queries // block) * block
            wide = Layout(layout.length, queries, layout.block)
        num_q, num_k = (
            -(-n // block) * block
            for n in ((wide.queries + wide.length) // shards, wide.queries + wide.length)
        )
        blocks = _visible_blocks(wide, shards, num_q, num_k, block)
        if blocks * block**2 <= MAX_WASTE * visible_pairs or block == BLOCKS[-1]:
            few = num_k // block <= MAX_FUSED_BLOCKS and shards == 1
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


def _visible_blocks(layout: Layout, shards: int, num_q: int, num_k: int, block: int) -> int:
    size = layout.queries + layout.length
    mask = _LayoutMask(layout, _q_index(size, shards, num_q), num_k)
    edges_q, edges_k = range(0, shards * num_q, block), range(0, num_k, block)
    return sum(
        int(mask[slice(i, i + block), slice(j, j + block)].any()) for i in edges_q for j in edges_k
    )


def _q_index(size: int, shards: int, num_q: int) -> np.ndarray:
    """Index of the query in each row of all shards; each shard is padded with its last query."""
    index = np.arange(size, dtype=np.int32).reshape(shards, -1)
    return np.pad(index, ((0, 0), (0, num_q - index.shape[1])), mode="edge").reshape(-1)


def _segment(rank_BT, layout, index):
    return jnp.where(rank_BT == layout.labels(index)[0][None], REAL, PADDING)


class _LayoutMask(splash_attention_mask.Mask):
    """The rule of a layout, by index. Rows may repeat a query."""

    def __init__(self, layout: Layout, q_index: np.ndarray, num_keys: int):
        self.q_sequence = q_index
        self.mask_function = _mask_function(layout)
        self._layout, self._num_keys = layout, num_keys
        self._seen = {}

    @property
    def shape(self):
        return len(self.q_sequence), self._num_keys

    def __getitem__(self, block):
        """A placeholder for a block of the mask, with one True if the block has a visible pair.

        The library reads nothing else, as the kernel computes the mask. A block is never all True:
        the library cannot join the tables of several shards if no block is partial."""
        rows, columns = block
        span = rows.start, rows.stop, columns.start, columns.stop
        if span not in self._seen:
            q_index, k_index = self.q_sequence[rows], np.arange(columns.start, columns.stop)
            self._seen[span] = layout_mask(self._layout, q_index, k_index).any()
        mask = np.zeros((rows.stop - rows.start, columns.stop - columns.start), bool)
        mask[0, 0] = self._seen[span]
        return mask


@functools.lru_cache(maxsize=64)
def _mask_function(layout: Layout):
    """The rule for the kernel: one function object per layout, because jit compares identities."""
    return lambda q_index, k_index: visible(*layout.labels(q_index), *layout.labels(k_index))


@functools.lru_cache(maxsize=64)
def _kernel(layout: Layout, shards: int, heads: int, interpret: bool):
    """The kernel for all shards of the queries."""
    tiles = tiling(layout, shards)
    sizes = {"block_q": tiles.block_q, "block_kv": tiles.block_k}
    sizes |= {"block_q_dkv": tiles.block_q, "block_kv_dkv": tiles.block_k}
    if not tiles.fused:
        sizes |= {"block_q_dq": tiles.block_q, "block_kv_dq": tiles.block_k}
    blocks = splash_attention_kernel.BlockSizes(**sizes, use_fused_bwd_kernel=tiles.fused)
    q_index = _q_index(layout.queries + layout.length, shards, tiles.num_q)
    mask = _LayoutMask(layout, q_index, tiles.num_k)
    with jax.ensure_compile_time_eval():
        return splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * heads),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=shards,
            residual_checkpoint_name="attention",  # for model.REMAT
            interpret=interpret,
        )


def _shard_of(kernel, shard, shards: int):
    """The kernel for one shard of the queries, given by its traced index."""

    def own(table):
        axis = table.ndim - 2 if table.ndim == 3 else 0  # [1, queries, keys] or [queries]
        size = table.shape[axis] // shards
        return jax.lax.dynamic_slice_in_dim(table, shard * size, size, axis)

    return jax.tree.map(own, kernel)
