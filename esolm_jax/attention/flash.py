"""Attention as block-sparse GPU kernels (Pallas, by way of Triton), for any labels.

A program computes one block of queries of one head over the blocks of keys of which it may read
anything, one after the other, and the gradient of keys and values the other way round. Which blocks
those are is known when tracing if the labels follow a layout, and found beforehand if they do not.

Tests hold the kernels to the rule in interpret mode and lower them to Triton's language. Triton 3.9
made machine code of that for compute capabilities 8.0 and 9.0, in registers but for 40 bytes of one
kernel, by hand; no GPU has run it. Shapes as in recompute.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from esolm_jax.attention import recompute as attention_vjp
from esolm_jax.attention.dense import MASKED
from esolm_jax.family.labels import Layout
from esolm_jax.family.rule import visible

BLOCK_BYTES = 128  # of a column of q or k in a block: 64 tokens in bfloat16, 32 in float32
NARROWEST = 16  # width of a head that Triton multiplies; all are powers of two
WIDE = 64  # width of a head: beyond it, four warps run out of registers
STAGES = 2  # with more, blocks of wide heads may not fit in shared memory


def flash(q_BHTK, k_BGSK, v_BGSK, *labels, layout: Layout | None, interpret: bool = False):
    """attention.attend over these labels; a layout (of queries and keys) says what can be skipped.

    Returns [B, H, T, K] in the dtype of v. `interpret` runs the kernels in Python, on any device.
    """
    width = q_BHTK.shape[-1]
    wide = max(NARROWEST, pl.next_power_of_2(width))
    q_BHTK = q_BHTK * width**-0.5
    q_BHTK, k_BGSK, v_BGSK = (
        attention_vjp.pad_to_multiple(a, 3, wide) for a in (q_BHTK, k_BGSK, v_BGSK)
    )
    way = _INTERPRETED if interpret else _COMPILED
    return attention_vjp.attend(way, layout, q_BHTK, k_BGSK, v_BGSK, labels)[..., :width]


def _dot(a, b, contract_a: int, contract_b: int):
    """Σ over one axis of each, float32."""
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _scores(q_TK, k_SK, q_labels, k_labels):
    """float32 [T, S], MASKED where invisible; q is scaled."""
    q_rank, q_in_context = (label[:, None] for label in q_labels)
    k_rank, k_in_context = (label[None] for label in k_labels)
    mask_TS = visible(q_rank, q_in_context != 0, k_rank, k_in_context != 0)
    return jnp.where(mask_TS, _dot(q_TK, k_SK, 1, 1), MASKED)


def _block(refs, j, size: int):
    return tuple(ref[pl.ds(j * size, size)] for ref in refs)


def _forward_kernel(*refs):
    """A block of queries. The softmax is built up: every block rescales what there is so far."""
    blocks, count, q, k, v, q_rank, q_in_context, k_rank, k_in_context, out, lse = refs
    q_TK, q_labels = q[...], (q_rank[...], q_in_context[...])

    def step(n, carry):
        out_TK, total, top_before = carry
        j = blocks[n]
        k_SK, v_SK, *k_labels = _block((k, v, k_rank, k_in_context), j, len(q_TK))
        scores = _scores(q_TK, k_SK, q_labels, k_labels)
        top = jnp.maximum(top_before, scores.max(axis=1))
        probs, keep = jnp.exp(scores - top[:, None]), jnp.exp(top_before - top)
        out_TK = out_TK * keep[:, None] + _dot(probs.astype(v_SK.dtype), v_SK, 1, 0)
        return out_TK, total * keep + probs.sum(axis=1), top

    zeros = jnp.zeros(q_TK.shape[:1], jnp.float32)
    start = jnp.zeros(q_TK.shape, jnp.float32), zeros, jnp.full_like(zeros, MASKED)
    out_TK, total, top = jax.lax.fori_loop(0, count[0], step, start)
    out[...] = (out_TK / total[:, None]).astype(out.dtype)
    lse[...] = top + jnp.log(total)


def _scores_gradient(q_TK, k_SK, v_SK, q_labels, k_labels, grad_TK, lse, delta):
    """(probabilities, gradient of the scores), float32 [T, S]."""
    probs = jnp.exp(_scores(q_TK, k_SK, q_labels, k_labels) - lse[:, None])
    return probs, probs * (_dot(grad_TK, v_SK, 1, 1) - delta[:, None])


def _queries_kernel(*refs):
    """The gradient of a block of queries."""
    blocks, count, q, k, v, q_rank, q_in_context, k_rank, k_in_context, *rest = refs
    grad, lse, delta, dq = rest
    of_queries = grad[...], lse[...], delta[...]
    q_TK, q_labels = q[...], (q_rank[...], q_in_context[...])

    def step(n, dq_TK):
        j = blocks[n]
        k_SK, v_SK, *k_labels = _block((k, v, k_rank, k_in_context), j, len(q_TK))
        _, dscores = _scores_gradient(q_TK, k_SK, v_SK, q_labels, k_labels, *of_queries)
        return dq_TK + _dot(dscores.astype(k_SK.dtype), k_SK, 1, 0)

    start = jnp.zeros(q_TK.shape, jnp.float32)
    dq[...] = jax.lax.fori_loop(0, count[0], step, start).astype(dq.dtype)


def _keys_kernel(*refs):
    """The gradients of a block of keys and values, over all query heads that read it."""
    blocks, count, q, k, v, q_rank, q_in_context, k_rank, k_in_context, *rest = refs
    grad, lse, delta, dk, dv = rest
    k_SK, v_SK, k_labels = k[...], v[...], (k_rank[...], k_in_context[...])
    heads = q.shape[0]

    def step(n, carry):
        dk_SK, dv_SK = carry
        i, head = blocks[jax.lax.div(n, heads)], jax.lax.rem(n, heads)
        at = head, pl.ds(i * len(k_SK), len(k_SK))
        q_TK, *of_queries = (ref[at] for ref in (q, grad, lse, delta))
        q_labels = _block((q_rank, q_in_context), i, len(k_SK))
        probs, dscores = _scores_gradient(q_TK, k_SK, v_SK, q_labels, k_labels, *of_queries)
        grad_TK = of_queries[0]
        dv_SK += _dot(probs.astype(grad_TK.dtype), grad_TK, 0, 0)
        return dk_SK + _dot(dscores.astype(q_TK.dtype), q_TK, 0, 0), dv_SK

    zeros = jnp.zeros(k_SK.shape, jnp.float32)
    dk_SK, dv_SK = jax.lax.fori_loop(0, count[0] * heads, step, (zeros, zeros))
    dk[...], dv[...] = dk_SK.astype(dk.dtype), dv_SK.astype(dv.dtype)


def _visited(table):
    """Of bool [N, M]: int32 [N, M], the true places of each row first, and int32 [N], how many.
    NumPy of NumPy: then it is known when tracing."""
    xp = np if isinstance(table, np.ndarray) else jnp
    places = xp.argsort(~table, axis=1, stable=True).astype(np.int32)
    return places, table.sum(axis=1).astype(np.int32)


def _filled(layout, q, k, v, labels):
    """(whole blocks of all, with flags as integers, which kernels can load; which blocks of queries
    see which of keys; tokens of a block)."""
    block = BLOCK_BYTES // q.dtype.itemsize
    labels = attention_vjp.fill_labels(labels, block)
    table = attention_vjp.block_mask(layout, labels, block)
    pad_to_multiple = functools.partial(attention_vjp.pad_to_multiple, block=block)
    labels = (label.astype(jnp.int32) for label in labels)
    return (
        (pad_to_multiple(q, 3, mode="edge"), pad_to_multiple(k, 2), pad_to_multiple(v, 2), *labels),
        table,
        block,
    )


class _Programs(NamedTuple):
    """A grid of programs (block, head, row) and what each sees; blocks of a head run side by side,
    for they read the same.

    Attributes:
      inputs: specs of what kernels take, in their order; the forward pass has no grad, lse, along.
      q, k, lse: specs of arrays like these.
    """

    grid: tuple[int, int, int]
    inputs: list
    q: pl.BlockSpec
    k: pl.BlockSpec
    lse: pl.BlockSpec


def _programs(q, k, block: int, of_queries: bool) -> _Programs:
    """Those of queries count query heads, and see their block of queries and all keys; those of
    keys the other way round."""
    (batch, groups, heads, num_q, width), num_k = q.shape, k.shape[2]
    blocks_q, blocks_k = num_q // block, num_k // block
    if of_queries:
        grid, others = (blocks_q, groups * heads, batch), blocks_k
        q_spec = pl.BlockSpec(
            (None, None, None, block, width), lambda i, h, b: (b, h // heads, h % heads, i, 0)
        )
        lse = pl.BlockSpec((None, None, None, block), lambda i, h, b: (b, h // heads, h % heads, i))
        k_spec = pl.BlockSpec((None, None, num_k, width), lambda i, h, b: (b, h // heads, 0, 0))
        q_label = pl.BlockSpec((None, block), lambda i, h, b: (b, i))
        k_label = pl.BlockSpec((None, num_k), lambda i, h, b: (b, 0))
    else:
        grid, others = (blocks_k, groups, batch), blocks_q
        q_spec = pl.BlockSpec((None, None, heads, num_q, width), lambda j, g, b: (b, g, 0, 0, 0))
        lse = pl.BlockSpec((None, None, heads, num_q), lambda j, g, b: (b, g, 0, 0))
        k_spec = pl.BlockSpec((None, None, block, width), lambda j, g, b: (b, g, j, 0))
        q_label = pl.BlockSpec((None, num_q), lambda j, g, b: (b, 0))
        k_label = pl.BlockSpec((None, block), lambda j, g, b: (b, j))
    places = pl.BlockSpec((None, others), lambda i, h, b: (i, 0))
    count = pl.BlockSpec((1,), lambda i, h, b: (i,))
    inputs = [places, count, q_spec, k_spec, k_spec, q_label, q_label, k_label, k_label]
    return _Programs(grid, [*inputs, q_spec, lse, lse], q_spec, k_spec, lse)


def _call(kernel, programs: _Programs, table, operands, outs, interpret: bool):
    """`table`: which blocks a block visits; `outs`: (spec, shape, dtype) of each result."""
    warps = 8 if operands[0].shape[-1] > WIDE else 4
    operands = *_visited(table), *operands
    return pl.pallas_call(
        kernel,
        grid=programs.grid,
        in_specs=programs.inputs[: len(operands)],
        out_specs=[spec for spec, *_ in outs],
        out_shape=[jax.ShapeDtypeStruct(*of) for _, *of in outs],
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=STAGES),
        interpret=interpret,
        name=f"flash{kernel.__name__}",
    )(*operands)


def _forward(interpret, layout, q, k, v, labels):
    length = q.shape[3]
    operands, table, block = _filled(layout, q, k, v, labels)
    q, k = operands[:2]
    programs = _programs(q, k, block, of_queries=True)
    outs = [(programs.q, q.shape, v.dtype), (programs.lse, q.shape[:-1], jnp.float32)]
    out, lse = _call(_forward_kernel, programs, table, operands, outs, interpret)
    return out[:, :, :, :length], lse[:, :, :, :length]


def _backward(interpret, layout, q, k, v, labels, grad, lse, delta):
    length, num_keys = q.shape[3], k.shape[2]
    operands, table, block = _filled(layout, q, k, v, labels)
    q, k, v = operands[:3]
    pad_to_multiple = functools.partial(attention_vjp.pad_to_multiple, axis=3, block=block)
    operands += pad_to_multiple(grad), pad_to_multiple(lse, mode="edge"), pad_to_multiple(delta)

    programs = _programs(q, k, block, of_queries=True)
    outs = [(programs.q, q.shape, q.dtype)]
    (dq,) = _call(_queries_kernel, programs, table, operands, outs, interpret)

    programs = _programs(q, k, block, of_queries=False)
    outs = [(programs.k, a.shape, a.dtype) for a in (k, v)]
    dk, dv = _call(_keys_kernel, programs, table.T, operands, outs, interpret)
    return dq[:, :, :, :length], dk[:, :, :num_keys], dv[:, :, :num_keys]


_COMPILED, _INTERPRETED = (
    attention_vjp.AttentionImpl(
        functools.partial(_forward, interpret), functools.partial(_backward, interpret)
    )
    for interpret in (False, True)
)
