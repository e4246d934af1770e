"""Memory-efficient attention: the custom VJP shared by chunked.py and flash.py.

Scores are recomputed in the backward pass. Only q, k, v, the result and the log of the softmax's
denominator (lse) are saved. An `AttentionImpl` computes them block by block (chunked.py in XLA,
flash.py in kernels); this module determines which blocks of queries and keys can be skipped.

Shapes: q [B, G, R, T, K] (R query heads share a key/value head), k and v [B, G, S, K]; labels are
(rank, in_context) [B, T] of the queries, then [B, S] of the keys.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from esolm_jax.family.labels import Layout
from esolm_jax.family.rule import layout_mask, visible


class AttentionImpl(NamedTuple):
    """The forward and the backward pass of an implementation.

    Attributes:
      forward: (layout, q, k, v, labels) → the result, float32 or v's dtype, and lse, float32
        [B, G, R, T].
      backward: (layout, q, k, v, labels, grad, lse, delta) → dq, dk, dv, where `delta` is
        Σ_k out·grad, float32 [B, G, R, T].
    """

    forward: Callable
    backward: Callable


def attend(impl: AttentionImpl, layout: Layout | None, q_BHTK, k_BGSK, v_BGSK, labels):
    """Attention over these labels, [B, H, T, K] in the dtype of v."""
    batch, heads, length, width = q_BHTK.shape
    groups = k_BGSK.shape[1]
    q = q_BHTK.reshape(batch, groups, heads // groups, length, width)
    return _attend(impl, layout, q, k_BGSK, v_BGSK, labels).reshape(q_BHTK.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(impl, layout, q, k, v, labels):
    return _forward(impl, layout, q, k, v, labels)[0]


def _forward(impl, layout, q, k, v, labels):
    out, lse = impl.forward(layout, q, k, v, labels)
    out = checkpoint_name(out.astype(v.dtype), "attention")  # for model.REMAT
    lse = checkpoint_name(lse, "attention")
    return out, (q, k, v, labels, out, lse)


def _backward(impl, layout, saved, grad):
    q, k, v, labels, out, lse = saved
    delta = _sum_last(out.astype(jnp.float32) * grad.astype(jnp.float32))
    gradients = impl.backward(layout, q, k, v, labels, grad.astype(v.dtype), lse, delta)
    return *(d.astype(a.dtype) for d, a in zip(gradients, (q, k, v), strict=True)), None


_attend.defvjp(_forward, _backward)


def _sum_last(x):
    """Σ over the last axis, as a matmul because XLA's short sums are slow on a CPU."""
    ones = jnp.ones((x.shape[-1], 1), x.dtype)
    return jnp.matmul(x, ones, precision=jax.lax.Precision.HIGHEST)[..., 0]


def pad_to_multiple(array, axis: int, block: int, **options):
    """Pads `array` along `axis` to a multiple of `block`, with the options of jnp.pad."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % block)
    return jnp.pad(array, widths, **options)


def pad_labels(labels, block: int):
    """Pads labels to whole blocks. Padding queries repeat the last one; their results are dropped.
    Padding keys have a rank that no query reads."""
    q_rank, q_in_context, k_rank, k_in_context = labels
    last = jnp.iinfo(jnp.int32).max
    return (
        pad_to_multiple(q_rank, 1, block, mode="edge"),
        pad_to_multiple(q_in_context, 1, block, mode="edge"),
        pad_to_multiple(k_rank, 1, block, constant_values=last),
        pad_to_multiple(k_in_context, 1, block, constant_values=True),
    )


def block_mask(layout: Layout | None, labels, block: int):
    """bool [T / block, S / block]: whether a block of queries may read a key of a block, in any row
    of these padded labels. With a layout, a NumPy array that is known at trace time."""
    if layout is not None:
        return _layout_blocks(layout, block)
    q_labels = [label.reshape(len(label), -1, block).swapaxes(0, 1) for label in labels[:2]]
    k_rank, k_in_context = (label[:, None] for label in labels[2:])

    def keys_seen(chunk):
        mask_BTS = visible(*(label[:, :, None] for label in chunk), k_rank, k_in_context)
        return mask_BTS.any(axis=(0, 1)).reshape(-1, block).any(axis=1)

    return jax.lax.map(keys_seen, q_labels)


@functools.lru_cache(maxsize=64)
def _layout_blocks(layout: Layout, block: int) -> np.ndarray:
    total = layout.length + layout.queries
    starts = np.arange(0, total, block)
    rows = (np.arange(start, min(start + block, total)) for start in starts)
    seen = (layout_mask(layout, row, np.arange(total)).any(axis=0) for row in rows)
    return np.stack([np.logical_or.reduceat(row, starts) for row in seen])
