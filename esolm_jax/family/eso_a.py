"""Eso-LM (A): as (B), but clean tokens of the diffusion phase read each other."""

import jax.numpy as jnp
import numpy as np

from esolm_jax.family import eso_b
from esolm_jax.family.family import Export, Family, Windows, Work
from esolm_jax.family.labels import LabelledBatch
from esolm_jax.family.phase import (
    Phase,
    PhaseSettings,
    two_phases,
)
from esolm_jax.family.streams import index, labelled, stream, take, two_streams


def _rank_clean_zero(valid, masked, order_BL):
    """Clean tokens: 0 (bidirectional); masked tokens and padding: their index in the order."""
    clean = take(valid & ~masked, order_BL)
    return jnp.where(clean, 0, index(order_BL))


def label_diffusion(x, valid, masked, order_BL, weight, *, mask: int) -> LabelledBatch:
    """As (B), but clean tokens see each other."""
    rank = _rank_clean_zero(valid, masked, order_BL)
    tokens = stream(jnp.where(masked, mask, x), order_BL, rank, in_context=True)
    return labelled(tokens, x, valid, order_BL, weight)


def label_sequential(x, valid, masked, order_BL, weight, *, mask: int) -> LabelledBatch:
    """As (B), but the clean tokens of the x copy see each other."""
    z = stream(jnp.where(masked, mask, x), order_BL, index(order_BL), in_context=False)
    context = stream(x, order_BL, _rank_clean_zero(valid, masked, order_BL), in_context=True)
    return labelled(two_streams(z, context), x, valid, order_BL, weight)


def phases(s: PhaseSettings) -> tuple[Phase, ...]:
    return two_phases(s, label_diffusion, label_sequential, clean_in_text_order=True)


def windows(schedule, block_length: int) -> Windows:
    """Diffusion: known tokens see each other, so each pass recomputes all of them. Sequential: one
    pass caches the diffusion tokens, then as (B)."""
    first, prefix = schedule.first, schedule.num_diffusion[None]
    cached = first > prefix  # the prefix, with its final ranks
    return Windows(
        prefill=np.zeros_like(schedule.num_known),
        start=np.where(cached, schedule.new_context, 0),
        end=first + schedule.sizes,
        rank=np.arange(schedule.order.shape[1]),
        bidirectional_below=np.minimum(first, prefix),
    )


def work(phase: Phase, length: int, alpha_0: float, block_length: int) -> Work:
    """The work of (B), plus the pairs of clean tokens that read each other."""
    base = eso_b.work(phase, length, alpha_0, block_length)
    both_clean = (
        alpha_0**2 if phase.can_trim_queries else alpha_0**2 / 3
    )  # α₀², or the mean of α_t²
    return Work(base.tokens, base.predicted, base.pairs + length * (length - 1) / 2 * both_clean)


FAMILY = Family(
    name="eso_a",
    phases=phases,
    windows=windows,
    work=work,
    schedules=("ancestral", "strided", "shuffled_strided", "left_to_right"),
    keeps_cache=False,
    can_extrapolate=False,
    no_speculation="known tokens read later ones",
    export=Export(
        prefix_of_one_rank=True,
        step_note="the cache is exact in the sequential phase only, after one step over all tokens "
        "of the diffusion phase with rank 0: while these are generated, they read each other",
    ),
)
