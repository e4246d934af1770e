"""Attention as block-sparse GPU kernels (Pallas, by way of Triton), for any labels.

A program loops over the blocks of keys that are visible to its own one or two blocks of queries of
a head; for the gradients of keys and values, over the blocks of queries that see its blocks of
keys. The mask of visible blocks is known at trace time if the labels follow a layout, and computed
before the kernel otherwise.

Tests compare the kernels with the rule in interpret mode and compile them with the GPU's compiler.
On one H200 (4 x 12 x 1024 x 64, bfloat16, forward and backward) the kernels before 14323df took
between a half and a fourth of the time of chunked and dense; not measured since. Shapes as in
recompute.py.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from esolm_jax.attention import recompute
from esolm_jax.attention.flash_kernels import (
    Labels,
    Settings,
    first_block,
    forward_kernel,
    keys_kernel,
    queries_kernel,
)
from esolm_jax.attention.kernel_products import padded
from esolm_jax.family.labels import Layout
from esolm_jax.family.rule import comparisons

BLOCK_BYTES = 128  # size of a column of q or k in a block: 64 tokens in bfloat16, 32 in float32
WIDE = 64  # width of a head; beyond it, registers and shared memory are short
# Compute capabilities (H100, B200, B300; None: not known) where four warps together multiply
# matrices that lie in shared memory.
WARPGROUPS = ("9.0", "10.0", "10.3", None)


def capability(device: jax.Device) -> str | None:
    """The compute capability of a GPU, such as "9.0"; None for other devices."""
    return getattr(device, "compute_capability", None)


class Options(NamedTuple):
    """The scale of scores, and the arguments of `flash`."""

    scale: float
    capability: str | None
    interpret: bool


def flash(
    q_BHTK,
    k_BGSK,
    v_BGSK,
    *labels,
    layout: Layout | None,
    capability: str | None = None,
    interpret: bool = False,
):
    """Attention over these labels, [B, H, T, K] in the dtype of v; see `attend`.

    `labels`: q_rank, q_in_context [B, T], k_rank, k_in_context [B, S]. With a layout, the skipped
    blocks are known at trace time. `capability` is that of the GPU, see `shape`.
    `interpret` runs the kernels in Python, on any device.
    """
    width = q_BHTK.shape[-1]
    q_BHTK, k_BGSK, v_BGSK = (
        recompute.pad_to_multiple(a, 3, padded(width)) for a in (q_BHTK, k_BGSK, v_BGSK)
    )
    impl = _impl(Options(width**-0.5, capability, interpret))
    return recompute.attend(impl, layout, q_BHTK, k_BGSK, v_BGSK, labels)[..., :width]


def _visible_blocks(table):
    """The indices of the true entries of each row of a bool [N, M], in front of the others, and
    their number: int32 [N, M] and [N]. NumPy arrays for a NumPy array."""
    xp = np if isinstance(table, np.ndarray) else jnp
    indices = xp.argsort(~table, axis=1, stable=True).astype(np.int32)
    return indices, table.sum(axis=1).astype(np.int32)


def _padded(layout, q, k, v, labels):
    """(operands, table, block): q [B, T, G, R, K], k and v [B, S, G, K], padded to whole blocks,
    and the labels of both; the mask of visible blocks; the tokens of a block."""
    block = BLOCK_BYTES // q.dtype.itemsize
    labels = recompute.pad_labels(labels, block)
    table = recompute.block_mask(layout, labels, block)
    pad_to_multiple = functools.partial(recompute.pad_to_multiple, block=block)
    q_reads, q_copy, k_context, k_copy = comparisons(*labels)
    least = q_reads.reshape(len(q_reads), -1, block).min(axis=2)
    most = k_context.reshape(len(k_context), -1, block).max(axis=2)
    q, k, v = tokens_first(q, 3), tokens_first(k, 2), tokens_first(v, 2)
    operands = (
        pad_to_multiple(q, 1, mode="edge"),
        pad_to_multiple(k, 1),
        pad_to_multiple(v, 1),
        Labels(q_reads, q_copy, least),
        Labels(k_context, k_copy, most),
    )
    return operands, table, block


def tokens_first(array, axis: int):
    """The array with its tokens behind its rows, as the matrix products around attention have
    them: the kernels take any strides, and no array is transposed."""
    return jnp.moveaxis(array, axis, 1)


class _Specs(NamedTuple):
    """A grid of programs (blocks, head, row) and the specs of their arrays: all tokens of a head,
    or of the query heads of a group. Programs of one head are adjacent because they read the same
    keys.

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


def _specs(q, k, table, block: int, of_queries: bool) -> _Specs:
    """Programs over blocks of queries are of a query head; programs over blocks of keys see all
    query heads of their group. `table`: whether a program sees a block."""
    (batch, num_q, groups, heads, width), num_k = q.shape, k.shape[1]
    if of_queries:
        q_spec = pl.BlockSpec(
            (None, num_q, None, None, width), lambda i, h, b: (b, 0, h // heads, h % heads, 0)
        )
        lse = pl.BlockSpec((None, None, None, num_q), lambda i, h, b: (b, h // heads, h % heads, 0))
        k_spec = pl.BlockSpec((None, num_k, None, width), lambda i, h, b: (b, 0, h // heads, 0))
    else:
        q_spec = pl.BlockSpec((None, num_q, None, heads, width), lambda j, g, b: (b, 0, g, 0, 0))
        lse = pl.BlockSpec((None, None, heads, num_q), lambda j, g, b: (b, g, 0, 0))
        k_spec = pl.BlockSpec((None, num_k, None, width), lambda j, g, b: (b, 0, g, 0))

    def row(size):
        return pl.BlockSpec((None, size), lambda i, h, b: (b, 0))

    grid = len(table), groups * heads if of_queries else groups, batch
    visible = pl.BlockSpec((None, table.shape[1]), lambda i, h, b: (i, 0))
    count = pl.BlockSpec((1,), lambda i, h, b: (i,))
    labels = [Labels(row(n), row(n), row(n // block)) for n in (num_q, num_k)]
    inputs = [visible, count, q_spec, k_spec, k_spec, *labels]
    return _Specs(grid, [*inputs, q_spec, lse, lse], q_spec, k_spec, lse)


class Shape(NamedTuple):
    """Adjacent blocks of one program, its warps, and the stages of its loop: with five, two blocks
    are on their way to shared memory while a third is computed; with up to four, one."""

    own: int
    warps: int
    stages: int


def shape(kernel, width: int, blocks: int, capability: str | None) -> Shape:
    """The shape of a kernel's programs, over `blocks` of its own in all. Two blocks read the other
    side half as often. By the compiler's report (docs/kernel_code.md): shapes whose registers
    suffice, so that products do not wait for each other.

    Args:
      capability: the GPU's compute capability, such as "9.0"; None: that of H100.
    """
    together, is_wide = capability in WARPGROUPS, width > WIDE
    if width > 2 * WIDE:
        few = together and kernel is not keys_kernel
        own, warps, stages = (1, 4, 2) if few else (1, 8, 1)
    elif not together:  # at most 100 KB of shared memory, as graphics cards have
        own, warps, stages = 1, 8 if is_wide else 4, 3
    elif is_wide:
        own, warps, stages = 2, 8, 5
    else:
        own, warps, stages = 2 if kernel is forward_kernel else 1, 4, 5
    return Shape(min(own, blocks), warps, stages)


def computed_blocks(kernel, width: int, table, capability: str | None) -> int:
    """Pairs of blocks that a kernel computes for one row and head, for the mask of blocks of
    queries and keys that see each other."""
    table = table.T if kernel is keys_kernel else table
    own = shape(kernel, width, len(table), capability).own
    return own * int(seen_by_programs(table, own).sum())


def seen_by_programs(table, own: int):
    """Whether a program of `own` blocks sees a block, for the mask of visible blocks."""
    first = first_block(np.arange(-(-len(table) // own)), own, len(table), np.minimum)
    return functools.reduce(operator.or_, (table[first + i] for i in range(own)))


def _call(kernel, options: Options, table, block, operands, outs):
    """Runs a kernel. `table`: the mask of visible blocks; `outs`: (name of the spec, shape, dtype)
    of each result."""
    q, k = operands[:2]
    programs = shape(kernel, q.shape[-1], len(table), options.capability)
    settings = Settings(options.scale, block, programs.own, len(table), options.interpret)
    seen = seen_by_programs(table, programs.own)
    specs = _specs(q, k, seen, block, of_queries=kernel is not keys_kernel)
    operands = *_visible_blocks(seen), *operands
    return pl.pallas_call(
        functools.partial(kernel, settings),
        grid=specs.grid,
        in_specs=specs.inputs[: len(operands)],
        out_specs=[getattr(specs, name) for name, *_ in outs],
        out_shape=[jax.ShapeDtypeStruct(*of) for _, *of in outs],
        compiler_params=triton.CompilerParams(num_warps=programs.warps, num_stages=programs.stages),
        interpret=options.interpret,
        name=f"flash_{kernel.__name__}",
    )(*operands)


def _forward(options, layout, q, k, v, labels):
    length = q.shape[3]
    operands, table, block = _padded(layout, q, k, v, labels)
    q = operands[0]
    lse = *q.shape[:1], *q.shape[2:4], q.shape[1]
    outs = [("q", q.shape, v.dtype), ("lse", lse, jnp.float32)]
    out, lse = _call(forward_kernel, options, table, block, operands, outs)
    return jnp.moveaxis(out[:, :length], 1, 3), lse[..., :length]


def _backward(options, layout, q, k, v, labels, grad, lse, delta):
    length, num_keys = q.shape[3], k.shape[2]
    operands, table, block = _padded(layout, q, k, v, labels)
    q, k, v = operands[:3]
    pad_to_multiple = functools.partial(recompute.pad_to_multiple, block=block)
    operands += (
        pad_to_multiple(tokens_first(grad, 3), 1),
        pad_to_multiple(lse, 3, mode="edge"),
        pad_to_multiple(delta, 3),
    )
    outs = [("q", q.shape, q.dtype)]
    (dq,) = _call(queries_kernel, options, table, block, operands, outs)
    outs = [("k", a.shape, a.dtype) for a in (k, v)]
    dk, dv = _call(keys_kernel, options, table.T, block, operands, outs)
    dk, dv = (jnp.moveaxis(a[:, :num_keys], 1, 2) for a in (dk, dv))
    return jnp.moveaxis(dq[:, :length], 1, 3), dk, dv


@functools.cache
def _impl(options: Options) -> recompute.AttentionImpl:
    """One object for each: it is a static argument of a custom VJP."""
    return recompute.AttentionImpl(
        functools.partial(_forward, options), functools.partial(_backward, options)
    )
