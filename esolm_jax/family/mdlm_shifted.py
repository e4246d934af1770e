"""MDLM with shifted predictions (Dream): the row of a token predicts the token after it.

Labels are those of MDLM: one stream, all tokens of one rank. The first token of a text is given.
"""

import dataclasses
import functools

import jax.numpy as jnp

from esolm_jax.family import mdlm
from esolm_jax.family.family import Export
from esolm_jax.family.labels import LabelledBatch
from esolm_jax.family.phase import Phase, PhaseSettings, diffusion_in_text_order


def _shift_left(a_BL):
    """The array, each entry moved one position to the left; 0 at the end."""
    return jnp.pad(a_BL[:, 1:], ((0, 0), (0, 1)))


def label(x, valid, masked, weight, *, mask: int) -> LabelledBatch:
    """MDLM's tokens, where token i − 1 predicts token i. The first token is never masked."""
    masked = masked & (jnp.arange(x.shape[1]) > 0)[None]
    unshifted = mdlm.label(x, valid, masked, jnp.where(masked, weight, 0), mask=mask)
    return unshifted.replace(
        target=_shift_left(unshifted.target), weight=_shift_left(unshifted.weight)
    )


def phases(s: PhaseSettings) -> tuple[Phase, ...]:
    to_label = functools.partial(label, mask=s.special.mask)
    diffusion = functools.partial(diffusion_in_text_order, s, to_label)
    return (Phase("diffusion", 1.0, diffusion, s.mean_masked),)


FAMILY = dataclasses.replace(
    mdlm.FAMILY,
    name="mdlm_shifted",
    phases=phases,
    predicts_next=True,
    export=Export(no_step="objective mdlm_shifted has no cached step, like mdlm"),
)
