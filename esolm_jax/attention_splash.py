"""Attention as a block-sparse TPU kernel (splash attention), for labels that follow from a layout.

Which blocks have anything visible is known when tracing: the others are not even loaded, and the
rule is computed inside the kernel from the indices. Labels that differ from the layout's are
padding, kept apart from the rest by segments.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from esolm_jax.attention import layout_mask, visible
from esolm_jax.labels import Layout

BLOCKS = (512, 256, 128)  # the first that divides the tokens, padded to a multiple of the last
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
    del q_in_context, k_in_context  # they are the layout's
    length, num_keys = q_BHTK.shape[2], k_BGSK.shape[2]
    if num_keys != layout.queries + layout.length:
        raise ValueError(f"{num_keys} keys do not fit {layout}")
    parts = num_keys // length
    kernel = _kernel(layout, parts, q_BHTK.shape[1], interpret)
    index = jnp.arange(length)
    if across:
        part = jax.lax.axis_index(across)
        index += part * length
        kernel = _part_of(kernel, part, parts)
    segments = splash_attention_kernel.SegmentIds(
        q=_fill(_segment(q_rank, layout, index), 1, mode="edge"),
        kv=_fill(_segment(k_rank, layout, jnp.arange(num_keys)), 1, constant_values=BEYOND),
    )
    # Queries that only fill the last block repeat the last one: none is without a key.
    q_BHTK = _fill(q_BHTK * q_BHTK.shape[-1] ** -0.5, 2, mode="edge")
    out = jax.vmap(kernel)(q_BHTK, _fill(k_BGSK, 2), _fill(v_BGSK, 2), segments)
    return out[:, :, :length].astype(v_BGSK.dtype)


def block_sizes(layout: Layout, parts: int = 1) -> tuple[int, int]:
    """Queries and keys of a block, when the queries are split into `parts`."""
    size = layout.queries + layout.length
    padded = (-(-n // BLOCKS[-1]) * BLOCKS[-1] for n in (size // parts, size))
    block_q, block_kv = (next(b for b in BLOCKS if n % b == 0) for n in padded)
    return block_q, block_kv


def _segment(rank_BT, layout, index):
    return jnp.where(rank_BT == layout.labels(index)[0][None], REAL, PADDING)


def _fill(array, axis, **how):
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % BLOCKS[-1])
    return jnp.pad(array, widths, **how)


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
    num_keys = layout.queries + layout.length
    q_index = np.arange(num_keys, dtype=np.int32).reshape(parts, -1)
    q_index = np.pad(q_index, ((0, 0), (0, -q_index.shape[1] % BLOCKS[-1])), mode="edge")
    num_keys += -num_keys % BLOCKS[-1]
    block_q, block_kv = block_sizes(layout, parts)
    # One kernel for dq and one for dk and dv: the fused one keeps dq of every block of keys apart,
    # in the compute dtype.
    blocks = splash_attention_kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    mask = _LayoutMask(layout, q_index.reshape(-1), num_keys)
    with jax.ensure_compile_time_eval():
        return splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * heads),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=parts,
            interpret=interpret,
        )


def _part_of(kernel, part, parts: int):
    """The kernel for one part of the queries, given by its (traced) number."""

    def own(table):
        axis = table.ndim - 2 if table.ndim == 3 else 0  # [1, queries, keys] or [queries]
        size = table.shape[axis] // parts
        return jax.lax.dynamic_slice_in_dim(table, part * size, size, axis)

    return jax.tree.map(own, kernel)
