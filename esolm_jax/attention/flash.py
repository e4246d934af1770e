"""Attention as block-sparse GPU kernels (Pallas, by way of Triton), for any labels.

A program loops over the blocks of keys that are visible to one block of queries of one head; for
the gradients of keys and values, over the blocks of queries that see one block of keys. The mask of
visible blocks is known at trace time if the labels follow a layout, and computed before the kernel
otherwise.

Tests compare the kernels with the rule in interpret mode and compile them with the GPU's compiler.
On one H200 (4 x 12 x 1024 x 64, bfloat16, forward and backward) they took between a half and a
fourth of the time of chunked and dense, with errors as dense's. Shapes as in recompute.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from esolm_jax.attention import recompute
from esolm_jax.attention.dense import MASKED
from esolm_jax.attention.kernel_products import dot
from esolm_jax.family.labels import Layout
from esolm_jax.family.rule import visible

BLOCK_BYTES = 128  # size of a column of q or k in a block: 64 tokens in bfloat16, 32 in float32
MIN_WIDTH = 16  # of a head width; Triton multiplies powers of two from this one
WIDE = 64  # width of a head; beyond it, four warps run out of registers
STAGES = 2  # with more, blocks of wide heads may exceed shared memory


def flash(q_BHTK, k_BGSK, v_BGSK, *labels, layout: Layout | None, interpret: bool = False):
    """Attention over these labels, [B, H, T, K] in the dtype of v; see `attend`.

    `labels`: q_rank, q_in_context [B, T], k_rank, k_in_context [B, S]. With a layout, the skipped
    blocks are known at trace time.
    `interpret` runs the kernels in Python, on any device.
    """
    width = q_BHTK.shape[-1]
    wide = max(MIN_WIDTH, pl.next_power_of_2(width))
    q_BHTK, k_BGSK, v_BGSK = (
        recompute.pad_to_multiple(a, 3, wide) for a in (q_BHTK, k_BGSK, v_BGSK)
    )
    impl = _impl(width**-0.5, interpret)
    return recompute.attend(impl, layout, q_BHTK, k_BGSK, v_BGSK, labels)[..., :width]


def _scores(scale, q_TK, k_SK, q_labels, k_labels):
    """float32 [T, S], MASKED where invisible. Scaled here: a scaled copy of q costs a kernel."""
    q_rank, q_in_context = (label[:, None] for label in q_labels)
    k_rank, k_in_context = (label[None] for label in k_labels)
    mask_TS = visible(q_rank, q_in_context != 0, k_rank, k_in_context != 0)
    return jnp.where(mask_TS, dot(q_TK, k_SK, 1, 1) * scale, MASKED)


def _block(refs, j, size: int):
    return tuple(ref[pl.ds(j * size, size)] for ref in refs)


def _forward_kernel(scale, *refs):
    """One block of queries. Online softmax: each block of keys rescales the running sums."""
    blocks, count, q, k, v, q_rank, q_in_context, k_rank, k_in_context, out, lse = refs
    q_TK, q_labels = q[...], (q_rank[...], q_in_context[...])

    def step(n, carry):
        out_TK, total, top_before = carry
        j = blocks[n]
        k_SK, v_SK, *k_labels = _block((k, v, k_rank, k_in_context), j, len(q_TK))
        scores = _scores(scale, q_TK, k_SK, q_labels, k_labels)
        top = jnp.maximum(top_before, scores.max(axis=1))
        probs, keep = jnp.exp(scores - top[:, None]), jnp.exp(top_before - top)
        out_TK = out_TK * keep[:, None] + dot(probs.astype(v_SK.dtype), v_SK, 1, 0)
        return out_TK, total * keep + probs.sum(axis=1), top

    zeros = jnp.zeros(q_TK.shape[:1], jnp.float32)
    start = jnp.zeros(q_TK.shape, jnp.float32), zeros, jnp.full_like(zeros, MASKED)
    out_TK, total, top = jax.lax.fori_loop(0, count[0], step, start)
    out[...] = (out_TK / total[:, None]).astype(out.dtype)
    lse[...] = top + jnp.log(total)


def _scores_gradient(scale, q_TK, k_SK, v_SK, q_labels, k_labels, grad_TK, lse, delta):
    """(probabilities, gradient of q · k), float32 [T, S]."""
    probs = jnp.exp(_scores(scale, q_TK, k_SK, q_labels, k_labels) - lse[:, None])
    return probs, probs * ((dot(grad_TK, v_SK, 1, 1) - delta[:, None]) * scale)


def _queries_kernel(scale, *refs):
    """The gradient of one block of queries."""
    blocks, count, q, k, v, q_rank, q_in_context, k_rank, k_in_context, *rest = refs
    grad, lse, delta, dq = rest
    of_queries = grad[...], lse[...], delta[...]
    q_TK, q_labels = q[...], (q_rank[...], q_in_context[...])

    def step(n, dq_TK):
        j = blocks[n]
        k_SK, v_SK, *k_labels = _block((k, v, k_rank, k_in_context), j, len(q_TK))
        _, dscores = _scores_gradient(scale, q_TK, k_SK, v_SK, q_labels, k_labels, *of_queries)
        return dq_TK + dot(dscores.astype(k_SK.dtype), k_SK, 1, 0)

    start = jnp.zeros(q_TK.shape, jnp.float32)
    dq[...] = jax.lax.fori_loop(0, count[0], step, start).astype(dq.dtype)


def _keys_kernel(scale, *refs):
    """The gradients of one block of keys and values, over all query heads that read it."""
    blocks, count, q, k, v, q_rank, q_in_context, k_rank, k_in_context, *rest = refs
    grad, lse, delta, dk, dv = rest
    k_SK, v_SK, k_labels = k[...], v[...], (k_rank[...], k_in_context[...])
    heads = q.shape[1]

    def step(n, carry):
        dk_SK, dv_SK = carry
        i, head = blocks[jax.lax.div(n, heads)], jax.lax.rem(n, heads)
        rows = pl.ds(i * len(k_SK), len(k_SK))
        q_TK, grad_TK = (ref[rows, head] for ref in (q, grad))
        of_queries = grad_TK, *(ref[head, rows] for ref in (lse, delta))
        q_labels = _block((q_rank, q_in_context), i, len(k_SK))
        probs, dscores = _scores_gradient(scale, q_TK, k_SK, v_SK, q_labels, k_labels, *of_queries)
        dv_SK += dot(probs.astype(grad_TK.dtype), grad_TK, 0, 0)
        return dk_SK + dot(dscores.astype(q_TK.dtype), q_TK, 0, 0), dv_SK

    zeros = jnp.zeros(k_SK.shape, jnp.float32)
    dk_SK, dv_SK = jax.lax.fori_loop(0, count[0] * heads, step, (zeros, zeros))
    dk[...], dv[...] = dk_SK.astype(dk.dtype), dv_SK.astype(dv.dtype)


def _visible_blocks(table):
    """The indices of the true entries of each row of a bool [N, M], in front of the others, and
    their number: int32 [N, M] and [N]. NumPy arrays for a NumPy array."""
    xp = np if isinstance(table, np.ndarray) else jnp
    indices = xp.argsort(~table, axis=1, stable=True).astype(np.int32)
    return indices, table.sum(axis=1).astype(np.int32)


def _padded(layout, q, k, v, labels):
    """(operands, table, block): q [B, T, G, R, K], k and v [B, S, G, K] and labels, padded to
    whole blocks, with flags as integers because kernels cannot load booleans; the mask of visible
    blocks; the tokens of a block."""
    block = BLOCK_BYTES // q.dtype.itemsize
    labels = recompute.pad_labels(labels, block)
    table = recompute.block_mask(layout, labels, block)
    pad_to_multiple = functools.partial(recompute.pad_to_multiple, block=block)
    labels = (label.astype(jnp.int32) for label in labels)
    q, k, v = tokens_first(q, 3), tokens_first(k, 2), tokens_first(v, 2)
    return (
        (pad_to_multiple(q, 1, mode="edge"), pad_to_multiple(k, 1), pad_to_multiple(v, 1), *labels),
        table,
        block,
    )


def tokens_first(array, axis: int):
    """The array with its tokens behind its rows, as the matrix products around attention have
    them: the kernels take any strides, and no array is transposed."""
    return jnp.moveaxis(array, axis, 1)


class _Programs(NamedTuple):
    """A grid of programs (block, head, row) and the specs of their arrays. Blocks of one head are
    adjacent in the grid because they read the same keys.

    Attributes:
      inputs: specs of the operands of a kernel, in order; the forward kernel takes no grad, lse and
        delta.
      q, k, lse: specs of arrays with the shape of these.
    """

    grid: tuple[int, int, int]
    inputs: list
    q: pl.BlockSpec
    k: pl.BlockSpec
    lse: pl.BlockSpec


def _programs(q, k, block: int, of_queries: bool) -> _Programs:
    """Programs over blocks of queries see one block of queries of a query head and all keys;
    programs over blocks of keys see one block of keys and all queries of the heads in its group."""
    (batch, num_q, groups, heads, width), num_k = q.shape, k.shape[1]
    blocks_q, blocks_k = num_q // block, num_k // block
    if of_queries:
        grid, others = (blocks_q, groups * heads, batch), blocks_k
        q_spec = pl.BlockSpec(
            (None, block, None, None, width), lambda i, h, b: (b, i, h // heads, h % heads, 0)
        )
        lse = pl.BlockSpec((None, None, None, block), lambda i, h, b: (b, h // heads, h % heads, i))
        k_spec = pl.BlockSpec((None, num_k, None, width), lambda i, h, b: (b, 0, h // heads, 0))
        q_label = pl.BlockSpec((None, block), lambda i, h, b: (b, i))
        k_label = pl.BlockSpec((None, num_k), lambda i, h, b: (b, 0))
    else:
        grid, others = (blocks_k, groups, batch), blocks_q
        q_spec = pl.BlockSpec((None, num_q, None, heads, width), lambda j, g, b: (b, 0, g, 0, 0))
        lse = pl.BlockSpec((None, None, heads, num_q), lambda j, g, b: (b, g, 0, 0))
        k_spec = pl.BlockSpec((None, block, None, width), lambda j, g, b: (b, j, g, 0))
        q_label = pl.BlockSpec((None, num_q), lambda j, g, b: (b, 0))
        k_label = pl.BlockSpec((None, block), lambda j, g, b: (b, j))
    indices = pl.BlockSpec((None, others), lambda i, h, b: (i, 0))
    count = pl.BlockSpec((1,), lambda i, h, b: (i,))
    inputs = [indices, count, q_spec, k_spec, k_spec, q_label, q_label, k_label, k_label]
    return _Programs(grid, [*inputs, q_spec, lse, lse], q_spec, k_spec, lse)


def _call(kernel, scale, programs: _Programs, table, operands, outs, interpret: bool):
    """Runs a kernel. `table`: the mask of visible blocks; `outs`: (spec, shape, dtype) of each
    result."""
    warps = 8 if operands[0].shape[-1] > WIDE else 4
    operands = *_visible_blocks(table), *operands
    return pl.pallas_call(
        functools.partial(kernel, scale),
        grid=programs.grid,
        in_specs=programs.inputs[: len(operands)],
        out_specs=[spec for spec, *_ in outs],
        out_shape=[jax.ShapeDtypeStruct(*of) for _, *of in outs],
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=STAGES),
        interpret=interpret,
        name=f"flash{kernel.__name__}",
    )(*operands)


def _forward(scale, interpret, layout, q, k, v, labels):
    length = q.shape[3]
    operands, table, block = _padded(layout, q, k, v, labels)
    q, k = operands[:2]
    programs = _programs(q, k, block, of_queries=True)
    lse = *q.shape[:1], *q.shape[2:4], q.shape[1]
    outs = [(programs.q, q.shape, v.dtype), (programs.lse, lse, jnp.float32)]
    out, lse = _call(_forward_kernel, scale, programs, table, operands, outs, interpret)
    return jnp.moveaxis(out[:, :length], 1, 3), lse[..., :length]


def _backward(scale, interpret, layout, q, k, v, labels, grad, lse, delta):
    length, num_keys = q.shape[3], k.shape[2]
    operands, table, block = _padded(layout, q, k, v, labels)
    q, k, v = operands[:3]
    pad_to_multiple = functools.partial(recompute.pad_to_multiple, block=block)
    operands += (
        pad_to_multiple(tokens_first(grad, 3), 1),
        pad_to_multiple(lse, 3, mode="edge"),
        pad_to_multiple(delta, 3),
    )

    programs = _programs(q, k, block, of_queries=True)
    outs = [(programs.q, q.shape, q.dtype)]
    (dq,) = _call(_queries_kernel, scale, programs, table, operands, outs, interpret)

    programs = _programs(q, k, block, of_queries=False)
    outs = [(programs.k, a.shape, a.dtype) for a in (k, v)]
    dk, dv = _call(_keys_kernel, scale, programs, table.T, operands, outs, interpret)
    dk, dv = (jnp.moveaxis(a[:, :num_keys], 1, 2) for a in (dk, dv))
    return jnp.moveaxis(dq[:, :length], 1, 3), dk, dv


@functools.cache
def _impl(scale: float, interpret: bool) -> recompute.AttentionImpl:
    """One object for each scale: it is a static argument of a custom VJP."""
    return recompute.AttentionImpl(
        functools.partial(_forward, scale, interpret),
        functools.partial(_backward, scale, interpret),
    )
