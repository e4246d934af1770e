"""AR: autoregression. One stream, shifted right after a start token; rank = position."""

import functools

import jax.numpy as jnp
import numpy as np

from esolm_jax.family.family import Export, Family, Windows, Work, refuse
from esolm_jax.family.labels import LabelledBatch
from esolm_jax.family.phase import Phase, PhaseSettings, SpecialIds
from esolm_jax.family.streams import index, labelled, stream


def label(x, valid, *, start: int) -> LabelledBatch:
    """x shifted right after a start token, rank = position."""
    shifted = jnp.concatenate([jnp.full_like(x[:, :1], start), x[:, :-1]], axis=1)
    order_BL = index(x)
    tokens = stream(shifted, order_BL, order_BL, in_context=True, block=1)
    return labelled(tokens, x, valid, order_BL, valid)


def label_in_order(x, valid, masked, order_BL, special: SpecialIds) -> LabelledBatch:
    """All masked tokens, each predicted from those before it in the text."""
    return label(x, valid, start=special.start).replace(weight=masked.astype(jnp.float32))


def _without_noise(label, key, x, valid) -> LabelledBatch:
    del key
    return label(x, valid)


def phases(s: PhaseSettings) -> tuple[Phase, ...]:
    to_label = functools.partial(label, start=s.special.start)
    return (Phase("ar", 1.0, functools.partial(_without_noise, to_label)),)


def windows(schedule, block_length: int) -> Windows:
    """One token per pass, each fed to predict the next; the order is the identity."""
    slot = np.arange(schedule.order.shape[1])
    refuse(
        (schedule.order != slot[None]).any(axis=1) | (schedule.sizes > 1).any(axis=0),
        "objective ar generates in text order, one token per step, after a prompt at the start",
    )
    first = schedule.first
    return Windows(schedule.num_known, start=first, end=first + 1, rank=slot)


def work(phase: Phase, length: int, alpha_0: float, block_length: int) -> Work:
    return Work(length, length * phase.masked_fraction, length * (length + 1) / 2)


FAMILY = Family(
    name="ar",
    phases=phases,
    windows=windows,
    work=work,
    fixed_alpha_0=0.0,
    schedules=("ancestral", "left_to_right"),
    replaced_schedules={"ancestral": "left_to_right"},
    is_shifted=True,
    no_parallel="one token per step",
    no_speculation="no mask to draft with",
    has_any_order_likelihood=True,  # of its single order
    label_in_order=label_in_order,
    export=Export(cached=True),
)
