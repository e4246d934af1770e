"""Eso-LM (B): both phases are causal in the generation order, so the KV cache is exact in both."""

import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.family import noise
from esolm_jax.family import order as orders
from esolm_jax.family.family import Export, Family, Windows, Work
from esolm_jax.family.labels import LabelledBatch
from esolm_jax.family.phase import (
    Phase,
    PhaseSettings,
    SpecialIds,
    two_phases,
)
from esolm_jax.family.streams import index, labelled, stream, two_streams


def label_diffusion(x, valid, masked, order_BL, weight, *, mask: int) -> LabelledBatch:
    """z_t in generation order, with causal attention."""
    z, rank = jnp.where(masked, mask, x), index(order_BL)
    tokens = stream(z, order_BL, rank, in_context=True, block=1)
    return labelled(tokens, x, valid, order_BL, weight)


def label_sequential(x, valid, masked, order_BL, weight, *, mask: int) -> LabelledBatch:
    """z ‖ x in generation order, the same ranks for both copies.

    With all tokens masked, this is the any-order likelihood: token r of z predicts x_σ(r) given
    x_σ(<r).
    """
    rank = index(order_BL)
    z = stream(jnp.where(masked, mask, x), order_BL, rank, in_context=False)
    tokens = two_streams(z, stream(x, order_BL, rank, in_context=True), block=1)
    return labelled(tokens, x, valid, order_BL, weight)


def label_in_order(x, valid, masked, order_BL, special: SpecialIds) -> LabelledBatch:
    """All masked tokens, each predicted from those before it in the order."""
    return label_sequential(x, valid, masked, order_BL, masked, mask=special.mask)


def any_order(key, x, valid, *, alpha_0: float, special: SpecialIds) -> LabelledBatch:
    """A random order σ, every token predicted from the tokens before it in σ: −log p_σ(x)."""
    key_mask, key_order = jax.random.split(key)
    late = noise.draw_masks(key_mask, alpha_0, valid)
    order_BL = orders.clean_first_then_left_to_right(key_order, late, valid)
    return label_in_order(x, valid, valid, order_BL, special)


def phases(s: PhaseSettings) -> tuple[Phase, ...]:
    return two_phases(s, label_diffusion, label_sequential, clean_in_text_order=False)


def windows(schedule, block_length: int) -> Windows:
    """Each pass runs the tokens of the previous one, as context, and its own masks."""
    return Windows(
        prefill=schedule.num_known,
        start=schedule.new_context,
        end=schedule.first + schedule.sizes,
        rank=np.arange(schedule.order.shape[1]),
    )


def work(phase: Phase, length: int, alpha_0: float, block_length: int) -> Work:
    predicted, causal = length * phase.masked_fraction, length * (length + 1) / 2
    if not phase.can_trim_queries:
        return Work(length, predicted, causal)
    queries = predicted * length - length * (length - 1) / 2 * phase.masked_fraction**2
    return Work(length + predicted, predicted, causal + queries)


FAMILY = Family(
    name="eso_b",
    phases=phases,
    windows=windows,
    work=work,
    has_confidence_order=True,
    has_any_order_likelihood=True,
    label_in_order=label_in_order,
    export=Export(cached=True),
)
