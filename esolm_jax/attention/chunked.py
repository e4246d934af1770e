"""Chunked attention in XLA: linear memory, any labels, any device.

Scores exist for one chunk of queries at a time and are recomputed in the backward pass
(recompute.py). Short sequences use an unrolled loop over chunks of queries, each against a slice of
the keys that its layout makes visible. Long sequences use a loop over the visible pairs of chunks.
All sums are float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.attention import recompute
from esolm_jax.attention.dense import MASKED
from esolm_jax.family.labels import Layout
from esolm_jax.family.rule import layout_mask, visible

CHUNK = 64  # queries of an unrolled chunk
MAX_UNROLLED = 8 * CHUNK  # queries; beyond that, the loop is faster and needs less memory
CHUNK_LOOP = 256  # queries, and keys, of one iteration of the loop


def chunked(q_BHTK, k_BGSK, v_BGSK, *labels, layout: Layout | None, platform: str):
    """Attention over these labels, [B, H, T, K] in the dtype of v; see `attend`.

    `labels`: q_rank, q_in_context [B, T], k_rank, k_in_context [B, S]. With a layout, the skipped
    keys are known at trace time.
    """
    dtype = v_BGSK.dtype
    if platform == "cpu":  # XLA lacks some matmuls of bfloat16 on a CPU
        q_BHTK, k_BGSK, v_BGSK = (a.astype(jnp.float32) for a in (q_BHTK, k_BGSK, v_BGSK))
    impl = _SHORT if q_BHTK.shape[2] <= MAX_UNROLLED else _LONG
    return recompute.attend(impl, layout, q_BHTK, k_BGSK, v_BGSK, labels).astype(dtype)


_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _scores(q, k, labels):
    """float32 [B, G, R, T, S], MASKED where invisible."""
    q_rank, q_in_context, k_rank, k_in_context = labels
    mask_BTS = visible(
        q_rank[:, :, None], q_in_context[:, :, None], k_rank[:, None], k_in_context[:, None]
    )
    scores = _einsum("bgrtk,bgsk->bgrts", q, k) * q.shape[-1] ** -0.5
    return jnp.where(mask_BTS[:, None, None], scores, MASKED)


def _gradients(q, k, v, labels, grad, lse, delta):
    """Gradients of these queries over these keys: dq [B, G, R, T, K], and dk and dv [B, G, K, S],
    transposed because that is faster on a CPU; float32. `delta`: Σ_k out·grad [B, G, R, T]."""
    probs = jnp.exp(_scores(q, k, labels) - lse[..., None])
    dscores = probs * (_einsum("bgrtk,bgsk->bgrts", grad, v) - delta[..., None])
    dscores, scale = dscores.astype(q.dtype), q.shape[-1] ** -0.5
    dq = _einsum("bgrts,bgsk->bgrtk", dscores, k) * scale
    dk = _einsum("bgrtk,bgrts->bgks", q, dscores) * scale
    return dq, dk, _einsum("bgrtk,bgrts->bgks", grad, probs.astype(v.dtype))


# Short: unrolled.


def _chunks(layout, length: int, num_keys: int):
    """(start, stop, ranges) of each chunk of queries; ranges hold the keys visible to it."""
    chunks = []
    for start in range(0, length, CHUNK):
        stop = min(start + CHUNK, length)
        ranges = ((0, num_keys),)
        if layout is not None:
            seen = layout_mask(layout, np.arange(start, stop), np.arange(num_keys)).any(axis=0)
            edges = np.flatnonzero(np.diff(seen, prepend=False, append=False)).tolist()
            ranges = tuple(zip(edges[::2], edges[1::2], strict=True))
        chunks.append((start, stop, ranges))
    return chunks


def _slice(array, ranges, axis):
    slices = [jax.lax.slice_in_dim(array, *bounds, axis=axis) for bounds in ranges]
    return slices[0] if len(slices) == 1 else jnp.concatenate(slices, axis=axis)


def _slice_labels(labels, start, stop, ranges):
    q_labels = (label[:, start:stop] for label in labels[:2])
    return (*q_labels, *(_slice(label, ranges, 1) for label in labels[2:]))


def _unrolled_forward(layout, q, k, v, labels):
    outs, lses = [], []
    for start, stop, ranges in _chunks(layout, q.shape[3], k.shape[2]):
        near = _slice_labels(labels, start, stop, ranges)
        scores = _scores(q[:, :, :, start:stop], _slice(k, ranges, 2), near)
        top = scores.max(axis=-1)
        probs = jnp.exp(scores - top[..., None])
        total = probs.sum(axis=-1)
        out = _einsum("bgrts,bgsk->bgrtk", probs.astype(v.dtype), _slice(v, ranges, 2))
        outs.append(out / total[..., None])
        lses.append(top + jnp.log(total))
    return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)


def _add(total, update, first, last):
    """total[..., first:last] += update.

    XLA of jax 0.11 crashes on a scatter into a whole axis inside shard_map.
    """
    if (first, last) == (0, total.shape[-1]):
        return total + update
    return total.at[..., first:last].add(update)


def _unrolled_backward(layout, q, k, v, labels, grad, lse, delta):
    dqs = []
    dk = dv = jnp.zeros_like(k.swapaxes(2, 3), jnp.float32)
    for start, stop, ranges in _chunks(layout, q.shape[3], k.shape[2]):
        near = _slice_labels(labels, start, stop, ranges)
        q_near, grad_near, lse_near, delta_near = (
            a[:, :, :, start:stop] for a in (q, grad, lse, delta)
        )
        k_near, v_near = _slice(k, ranges, 2), _slice(v, ranges, 2)
        dq, dk_near, dv_near = _gradients(
            q_near, k_near, v_near, near, grad_near, lse_near, delta_near
        )
        dqs.append(dq)
        offset = 0
        for first, last in ranges:
            columns = slice(offset, offset + last - first)
            dk = _add(dk, dk_near[..., columns], first, last)
            dv = _add(dv, dv_near[..., columns], first, last)
            offset = columns.stop
    return jnp.concatenate(dqs, axis=3), dk.swapaxes(2, 3), dv.swapaxes(2, 3)


# Long: a loop over pairs (chunk of queries, chunk of keys).

_pad = functools.partial(recompute.pad_to_multiple, block=CHUNK_LOOP)


def _pairs(layout, labels):
    """Pairs of chunks, int32 [num_q · num_k, 2], those with a visible pair first, and their number.

    With a layout, the array holds no other pairs."""
    table = recompute.block_mask(layout, labels, CHUNK_LOOP)
    if isinstance(table, np.ndarray):
        pairs = np.argwhere(table).astype(np.int32)
        return jnp.asarray(pairs), len(pairs)
    order = jnp.argsort(~table.reshape(-1), stable=True)
    pairs = jnp.stack(jnp.divmod(order, table.shape[1]), axis=1)
    return pairs.astype(jnp.int32), table.sum()


def _get(array, chunk, axis):
    return jax.lax.dynamic_slice_in_dim(array, chunk * CHUNK_LOOP, CHUNK_LOOP, axis)


def _put(array, update, chunk, axis):
    return jax.lax.dynamic_update_slice_in_dim(array, update, chunk * CHUNK_LOOP, axis)


def _get_labels(labels, i, j):
    return (
        *(_get(label, i, 1) for label in labels[:2]),
        *(_get(label, j, 1) for label in labels[2:]),
    )


def _loop_forward(layout, q, k, v, labels):
    """Online softmax: each pair of chunks rescales the running sums of its queries."""
    length = q.shape[3]
    labels = recompute.pad_labels(labels, CHUNK_LOOP)
    q, k, v = _pad(q, 3, mode="edge"), _pad(k, 2), _pad(v, 2)
    pairs, count = _pairs(layout, labels)

    def step(n, carry):
        out, total, top = carry
        i, j = pairs[n, 0], pairs[n, 1]
        scores = _scores(_get(q, i, 3), _get(k, j, 2), _get_labels(labels, i, j))
        top_before = _get(top, i, 3)
        top_now = jnp.maximum(top_before, scores.max(axis=-1))
        probs = jnp.exp(scores - top_now[..., None])
        keep = jnp.exp(top_before - top_now)
        new = _einsum("bgrts,bgsk->bgrtk", probs.astype(v.dtype), _get(v, j, 2))
        return (
            _put(out, _get(out, i, 3) * keep[..., None] + new, i, 3),
            _put(total, _get(total, i, 3) * keep + probs.sum(axis=-1), i, 3),
            _put(top, top_now, i, 3),
        )

    rows = jnp.zeros(q.shape[:-1], jnp.float32)
    start = jnp.zeros(q.shape, jnp.float32), rows, jnp.full_like(rows, MASKED)
    out, total, top = jax.lax.fori_loop(0, count, step, start)
    lse = top + jnp.log(total)
    return (out / total[..., None])[:, :, :, :length], lse[:, :, :, :length]


def _loop_backward(layout, q, k, v, labels, grad, lse, delta):
    length, num_keys = q.shape[3], k.shape[2]
    labels = recompute.pad_labels(labels, CHUNK_LOOP)
    q, lse = _pad(q, 3, mode="edge"), _pad(lse, 3, mode="edge")
    k, v, grad, delta = _pad(k, 2), _pad(v, 2), _pad(grad, 3), _pad(delta, 3)
    pairs, count = _pairs(layout, labels)

    def step(n, carry):
        dq, dk, dv = carry
        i, j = pairs[n, 0], pairs[n, 1]
        near = _get_labels(labels, i, j)
        q_near, grad_near, lse_near, delta_near = (_get(a, i, 3) for a in (q, grad, lse, delta))
        new_dq, new_dk, new_dv = _gradients(
            q_near, _get(k, j, 2), _get(v, j, 2), near, grad_near, lse_near, delta_near
        )
        return (
            _put(dq, _get(dq, i, 3) + new_dq, i, 3),
            _put(dk, _get(dk, j, 3) + new_dk, j, 3),
            _put(dv, _get(dv, j, 3) + new_dv, j, 3),
        )

    zeros = jnp.zeros_like(k.swapaxes(2, 3), jnp.float32)
    start = jnp.zeros(q.shape, jnp.float32), zeros, zeros
    dq, dk, dv = jax.lax.fori_loop(0, count, step, start)
    dk, dv = (d.swapaxes(2, 3)[:, :, :num_keys] for d in (dk, dv))
    return dq[:, :, :, :length], dk, dv


_SHORT = recompute.AttentionImpl(_unrolled_forward, _unrolled_backward)
_LONG = recompute.AttentionImpl(_loop_forward, _loop_backward)
