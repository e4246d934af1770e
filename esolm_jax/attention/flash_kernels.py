"""The GPU kernels of flash.py: what one program computes.

A program has some adjacent blocks of queries (or of keys) of its own, and loops over the blocks of
keys (of queries) that they see. On a GPU such a loop is as fast as it issues instructions, so:
exp is a power of two, by two instructions; the rule is two comparisons, and is evaluated only in
blocks where a query does not see a key; scale is applied to gradients at the end.

Shapes: T queries and S keys, those of a program or those of the other block; width K.
"""

import math
import operator
import struct
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from esolm_jax.attention.dense import MASKED
from esolm_jax.attention.kernel_products import dot

LOG2_E = 1 / math.log(2)
# Where the running maximum starts: below every real score, and so far above a scaled MASKED that
# exp2 of the difference is exactly 0.
LOWEST = -1e20


class Labels(NamedTuple):
    """The labels of one side, as `rule.comparisons` has them: int32, one of each for a token.

    Attributes:
      context, copy: what is compared for tokens in context, and for query copies.
      bound: of each block of tokens, the least `context` of queries, the largest of keys. Where
        the largest is at most the least, all queries of a block see all keys of the other.
    """

    context: jax.Array
    copy: jax.Array
    bound: jax.Array

    def at(self, rows):
        return self.context[rows], self.copy[rows]


class Settings(NamedTuple):
    """What is fixed for a kernel.

    Attributes:
      scale: of the scores. block: tokens of a block.
      own: blocks of a program. blocks: of all programs of a head.
    """

    scale: float
    block: int
    own: int
    blocks: int
    interpret: bool


def forward_kernel(settings: Settings, seen, count, q, k, v, q_labels, k_labels, out, lse):
    """Blocks of queries. Online softmax: each block of keys rescales the running sums.

    Args:
      seen: the indices of the blocks that the program sees, in front. count: [1], how many.
    """
    own, least = _own(settings, q_labels, jnp.minimum)
    q_TK, labels = q[own], q_labels.at(own)
    scale = settings.scale * LOG2_E

    def step(n, carry):
        out_TK, total, top_before = carry
        j, rows = _other(settings, seen, n)
        scores = dot(q_TK, k[rows], 1, 1)
        scores = _masked(scores, labels, k_labels.at(rows), k_labels.bound[j] <= least)
        top = jnp.maximum(top_before, scores.max(axis=1) * scale)
        probs = _exp2(settings, scores, scale, top[:, None])
        keep = _exp2(settings, top_before, 1.0, top)
        v_SK = v[rows]
        out_TK = out_TK * keep[:, None] + dot(probs.astype(v_SK.dtype), v_SK, 1, 0)
        return out_TK, total * keep + probs.sum(axis=1), top

    zeros = jnp.zeros(q_TK.shape[:1], jnp.float32)
    start = jnp.zeros(q_TK.shape, jnp.float32), zeros, jnp.full_like(zeros, LOWEST)
    out_TK, total, top = jax.lax.fori_loop(0, count[0], step, start)
    out[own] = (out_TK / total[:, None]).astype(out.dtype)
    lse[own] = top / LOG2_E + jnp.log(total)


def queries_kernel(
    settings: Settings, seen, count, q, k, v, q_labels, k_labels, grad, lse, delta, dq
):
    """The gradients of blocks of queries."""
    own, least = _own(settings, q_labels, jnp.minimum)
    q_TK, grad_TK, labels = q[own], grad[own], q_labels.at(own)
    lse_T1, delta_T1 = lse[own][:, None] * LOG2_E, delta[own][:, None]

    def step(n, dq_TK):
        j, rows = _other(settings, seen, n)
        k_SK = k[rows]
        scores = dot(q_TK, k_SK, 1, 1)
        scores = _masked(scores, labels, k_labels.at(rows), k_labels.bound[j] <= least)
        probs = _exp2(settings, scores, settings.scale * LOG2_E, lse_T1)
        dscores = probs * (dot(grad_TK, v[rows], 1, 1) - delta_T1)
        return dq_TK + dot(dscores.astype(k_SK.dtype), k_SK, 1, 0)

    start = jnp.zeros(q_TK.shape, jnp.float32)
    dq_TK = jax.lax.fori_loop(0, count[0], step, start)
    dq[own] = (dq_TK * settings.scale).astype(dq.dtype)


def keys_kernel(
    settings: Settings, seen, count, q, k, v, q_labels, k_labels, grad, lse, delta, dk, dv
):
    """The gradients of blocks of keys and values, over all query heads that read them.

    Scores are [S, T]: every product then has its first operand in registers.
    """
    own, most = _own(settings, k_labels, jnp.maximum)
    k_SK, v_SK, labels = k[own], v[own], k_labels.at(own)
    heads = q.shape[1]

    def step(n, carry):
        dk_SK, dv_SK = carry
        i, rows = _other(settings, seen, jax.lax.div(n, heads))
        head = jax.lax.rem(n, heads)
        q_TK, grad_TK = q[rows, head], grad[rows, head]
        lse_1T, delta_1T = lse[head, rows][None] * LOG2_E, delta[head, rows][None]
        scores = dot(k_SK, q_TK, 1, 1)
        is_full = most <= q_labels.bound[i]
        scores = _masked(scores, labels, q_labels.at(rows), is_full, operator.ge)
        probs = _exp2(settings, scores, settings.scale * LOG2_E, lse_1T)
        dscores = probs * (dot(v_SK, grad_TK, 1, 1) - delta_1T)
        dv_SK += dot(probs.astype(grad_TK.dtype), grad_TK, 1, 0)
        return dk_SK + dot(dscores.astype(q_TK.dtype), q_TK, 1, 0), dv_SK

    zeros = jnp.zeros(k_SK.shape, jnp.float32)
    dk_SK, dv_SK = jax.lax.fori_loop(0, count[0] * heads, step, (zeros, zeros))
    dk[own] = (dk_SK * settings.scale).astype(dk.dtype)
    dv[own] = dv_SK.astype(dv.dtype)


def first_block(program, own: int, blocks: int, minimum: Callable):
    """The first block of a program. The last programs overlap where `own` does not divide `blocks`;
    what both store is the same."""
    return minimum(program * own, blocks - own)


def _own(settings: Settings, labels: Labels, closest: Callable):
    """(the tokens of the program, the bound of their labels)"""
    first = first_block(pl.program_id(0), settings.own, settings.blocks, jnp.minimum)
    bound = labels.bound[first]
    for i in range(1, settings.own):
        bound = closest(bound, labels.bound[first + i])
    return pl.ds(first * settings.block, settings.own * settings.block), bound


def _other(settings: Settings, seen, n):
    """(the n-th block that the program sees, its tokens)"""
    return seen[n], pl.ds(seen[n] * settings.block, settings.block)


def _masked(scores, own_labels, other_labels, is_full, reads: Callable = operator.le):
    """The scores, [own, other], MASKED where invisible.

    Args:
      is_full: all are visible. reads: how `context` of other tokens compares with that of own ones
        where a query sees a key: <= if the own tokens are queries, >= if they are keys.
    """
    own_context, own_copy = (label[:, None] for label in own_labels)
    context, copy = (label[None] for label in other_labels)

    def masked():
        return jnp.where(reads(context, own_context) | (copy == own_copy), scores, MASKED)

    return jax.lax.cond(is_full, lambda: scores, masked)


def _exp2(settings: Settings, x, scale: float, shift):
    """2 ** (x · scale - shift), float32, by two instructions; jnp.exp2 takes eight, to represent
    results below 2 ** -126, which are zero here."""
    if settings.interpret:
        return jnp.exp2(x * scale - shift)
    factor = "0f" + struct.pack(">f", scale).hex()
    (power,) = triton.elementwise_inline_asm(
        f"{{ .reg .f32 x; fma.rn.ftz.f32 x, $1, {factor}, $2; ex2.approx.ftz.f32 $0, x; }}",
        args=[x, jnp.broadcast_to(-shift, x.shape)],
        constraints="=r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return power
