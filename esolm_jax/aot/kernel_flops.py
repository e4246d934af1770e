"""FLOPs of the attention kernels (splash on TPUs, flash on GPUs) in a compiled step.

Counts the blocks that a kernel computes: those that one of its programs sees.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.aot import hlo
from esolm_jax.attention import flash, flash_kernels, recompute
from esolm_jax.attention.splash import Tiling, tiling
from esolm_jax.family import trim
from esolm_jax.family.labels import Layout, Tokens
from esolm_jax.parallel import sharding
from esolm_jax.process import prng
from esolm_jax.training.train_step import Trainer

# The branch of train_step that runs the trimmed pass (see report._full_branch), by the op_name of
# the conditional, or by its name if the compiler dropped the op_name.
USUAL = {"trimmed/cond": 1, "conditional": 1}
# Products of a block of scores in each kernel: scores and values; then, backward, scores again,
# the gradient of the probabilities and that of q, or of k and v.
_PRODUCTS = {
    "splash_mha_fwd": 2,
    "splash_mha_dq": 3,
    "splash_mha_dkv": 4,
    "flash_forward_kernel": 2,
    "flash_queries_kernel": 3,
    "flash_keys_kernel": 4,
}
DRAWN_ROWS = 16  # of labels without a layout


def kernel_flops(
    training: Trainer, text: str, queries: Sequence[int | None] | None = None
) -> dict[str, float]:
    """FLOPs of one execution of every attention kernel in a program, by its name.

    queries: query copies of a trimmed pass of each phase; None: those of a training step.
    """
    kernels = hlo.analyse(text, trip_counts={"": 1}, branches=USUAL).kernels
    named = [(kernel, name) for kernel in kernels if (name := _name(kernel))]
    is_flash = any(name.startswith("flash") for _, name in named)
    labels = _labels(training, training.objective.queries if queries is None else queries)
    count = _flash(training, labels) if is_flash else _splash(training, labels)
    flops = {kernel.name: count(kernel, name) for kernel, name in named}
    return {name: value for name, value in flops.items() if value is not None}


def _name(kernel: hlo.Kernel) -> str | None:
    """Which of ours it is."""
    names = f"{kernel.name} {kernel.op_name}"
    return next((name for name in _PRODUCTS if name in names), None)


def _splash(training: Trainer, labels: list[tuple]):
    """(kernel, name in _PRODUCTS) → FLOPs; None if no layout has the kernel's number of keys."""
    model, parts = training.built.model, training.built.mesh.shape["sequence"]
    by_size: dict[int, Tiling] = {}
    for layout in _layouts(training, labels):
        tiles = tiling(layout, parts)
        by_size.setdefault(tiles.num_k, tiles)

    def count(kernel: hlo.Kernel, name: str) -> float | None:
        """Operands: …, q [B, H, T, K], k [B, G, S, K], …; with one row, [H, T, K] and [G, S, K]."""
        rank = max(len(s.sizes) for s in kernel.operands)
        shapes = [s.sizes for s in kernel.operands if len(s.sizes) == rank]
        tiles = by_size.get(max(shape[-2] for shape in shapes))
        if tiles is None:
            return None
        products = _PRODUCTS[name]
        if tiles.fused and "dkv" in kernel.name:
            products += 1  # and the gradient of q
        heads = max(shape[-3] for shape in shapes)
        rows = shapes[0][0] if rank == 4 else 1
        pairs = rows * heads * tiles.blocks * tiles.block_q * tiles.block_k / parts
        return products * 2 * pairs * model.head_width

    return count


def _layouts(training: Trainer, labels: list[tuple]) -> list[Layout]:
    """The layouts of all passes, trimmed or not."""
    length = training.config.data.seq_len
    layouts = []
    for phase, queries, tokens in labels:
        layout = tokens.layout
        if layout is None:  # ranks depend on the row
            layout = Layout(length, length) if phase.can_trim_queries else Layout(length)
        if phase.can_trim_queries:
            layouts.append(Layout(length, queries or length, layout.block))
        layouts.append(layout)
    return layouts


def _labels(training: Trainer, kept: Sequence[int | None]) -> list[tuple]:
    """(phase, query copies of a trimmed pass or None, shapes of the untrimmed tokens)."""
    length = training.config.data.seq_len
    row = jax.ShapeDtypeStruct((1, length), "int32"), jax.ShapeDtypeStruct((1, length), "bool")
    key = jax.eval_shape(lambda: prng.key(0))
    return [
        (phase, queries, jax.eval_shape(phase.label, key, *row).tokens)
        for phase, queries in zip(training.phases, kept, strict=True)
    ]


def _flash(training: Trainer, labels: list[tuple]):
    """(kernel, name in _PRODUCTS) → FLOPs; None if no pass has the kernel's number of keys.

    With the sequence sharded, every shard is assumed to compute its share of the blocks.
    """
    parts = training.built.mesh.shape["sequence"]
    block = flash.BLOCK_BYTES // jnp.dtype(training.built.model.dtype).itemsize
    capability = flash.capability(sharding.device(training.built.mesh))
    by_size = {}
    for phase, queries, tokens in labels:
        for kept in {None, queries} if phase.can_trim_queries else {None}:
            table = _visible_blocks(training, phase, tokens.layout, kept, block)
            by_size.setdefault(table.shape[1] * block, table)

    def count(kernel: hlo.Kernel, name: str) -> float | None:
        """Operands: indices of blocks, their numbers, q [B, T, G, R, K], k [B, S, G, K], …"""
        rows, _, groups, heads, width = kernel.operands[2].sizes
        table = by_size.get(kernel.operands[3].sizes[1])
        if table is None:
            return None
        run = getattr(flash_kernels, name.removeprefix("flash_"))
        blocks = flash.computed_blocks(run, width, table, capability)
        return _PRODUCTS[name] * 2 * block**2 * width * rows * groups * heads * blocks / parts

    return count


def _visible_blocks(training: Trainer, phase, layout, queries, block: int) -> np.ndarray:
    """bool [T / block, S / block], blocks with a visible pair, of a pass with `queries` query
    copies; None: all.

    Without a layout, the kernel computes the blocks that any of its rows sees; those of
    DRAWN_ROWS random rows are assumed.
    """
    length = training.config.data.seq_len
    if layout is not None:
        kept = layout.queries if queries is None else queries
        table = recompute.block_mask(Layout(layout.length, kept, layout.block), (), block)
    else:
        text = jnp.zeros((DRAWN_ROWS, length), jnp.int32)
        labelled = phase.label(prng.key(0), text, text == 0)
        tokens: Tokens = (labelled if queries is None else trim.trim(labelled, queries)).tokens
        labels = recompute.pad_labels((tokens.rank, tokens.in_context) * 2, block)
        table = recompute.block_mask(None, labels, block)
    return np.asarray(table)
