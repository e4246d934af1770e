"""MDLM: masked diffusion. One stream, all tokens of one rank (bidirectional)."""

import functools

import jax.numpy as jnp
import numpy as np

from esolm_jax.family.family import Export, Family, Windows, Work, whole_text
from esolm_jax.family.labels import LabelledBatch
from esolm_jax.family.phase import Phase, PhaseSettings, diffusion_in_text_order
from esolm_jax.family.streams import index, labelled, stream


def label(x, valid, masked, weight, *, mask: int) -> LabelledBatch:
    """z_t, all of one rank; padding has a later rank, so no token reads it."""
    order_BL = index(x)
    z, rank = jnp.where(masked, mask, x), jnp.where(valid, 0, 1)
    tokens = stream(z, order_BL, rank, in_context=True, block=x.shape[1])
    return labelled(tokens, x, valid, order_BL, weight)


def phases(s: PhaseSettings) -> tuple[Phase, ...]:
    to_label = functools.partial(label, mask=s.special.mask)
    diffusion = functools.partial(diffusion_in_text_order, s, to_label)
    return (Phase("diffusion", 1.0, diffusion, s.mean_masked),)


def windows(schedule, block_length: int) -> Windows:
    """Every pass runs the whole canvas, and nothing stays in the cache."""
    return Windows(
        prefill=np.zeros_like(schedule.num_known),
        start=np.int32(0),
        end=schedule.length[None],
        rank=np.zeros(schedule.order.shape[1]),
    )


def work(phase: Phase, length: int, alpha_0: float, block_length: int) -> Work:
    return Work(length, length * phase.masked_fraction, length**2)


FAMILY = Family(
    name="mdlm",
    phases=phases,
    windows=windows,
    work=work,
    fixed_alpha_0=1.0,
    rank_span=whole_text,
    schedules=("ancestral", "strided", "shuffled_strided", "left_to_right"),
    has_confidence_order=True,
    keeps_cache=False,
    can_extrapolate=False,
    no_speculation="known tokens read later ones",
    export=Export(
        no_step="objective mdlm has no cached step: known tokens read those generated later"
    ),
)
