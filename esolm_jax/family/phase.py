"""Phases: the terms of a family's loss. A phase draws masks and an order, and labels the tokens.

Shapes: x int32 [B, L]; valid bool [B, L] (False = padding, at the end of the row); masked bool
[B, L] and weight float32 [B, L], in text order; order int32 [B, L], the position at each rank.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from esolm_jax.family import noise, registry
from esolm_jax.family import order as orders
from esolm_jax.family.labels import LabelledBatch


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Special ids: `mask` marks a token to be predicted, `start` begins an AR text."""

    mask: int
    start: int


@dataclasses.dataclass(frozen=True)
class Phase:
    """One term of an objective.

    Attributes:
      fraction: the share of a training batch that feeds it (in evaluation, each row feeds each
        phase).
      label: (key, x, valid) → LabelledBatch.
      masked_fraction: probability that a token is predicted, on average.
      can_trim_queries: whether query copies without a weight can be left out because no other
        token reads them.
    """

    name: str
    fraction: float
    label: Callable[[jax.Array, jax.Array, jax.Array], LabelledBatch]
    masked_fraction: float = 1.0
    can_trim_queries: bool = False


@dataclasses.dataclass(frozen=True)
class PhaseSettings:
    """The settings that the phases of a family depend on.

    Attributes:
      alpha_0: α₀ of the config, which determines shapes and the shares of the batch.
      noise_alpha_0: α₀ of the noise: a traced scalar while α₀ is annealed, else `alpha_0`.
      kappa: κ, the share of the batch that feeds the diffusion phase at 0 < α₀ < 1.
      seq_len: L. block_length: tokens of a block.
      low_variance: whether the ELBO weight of the diffusion phase is dropped (training only).
      time_offset: u of noise.stratified_times, a traced scalar; None: drawn.
    """

    special: SpecialIds
    alpha_0: float
    noise_alpha_0: Any
    kappa: float
    seq_len: int
    block_length: int
    low_variance: bool
    time_offset: Any = None

    @property
    def mean_masked(self) -> float:
        """The mean of 1 − α_t: the probability that the diffusion phase predicts a token."""
        return 1 - self.alpha_0 / 2


def _noise(s: PhaseSettings, key, valid, times_per_row: int):
    """Masks and weights of a diffusion phase, bool and float32 [B, L]. `times_per_row` > 1 gives
    each block of a row its own time (BD3-LM)."""
    key_time, key_mask = jax.random.split(key)
    batch, length = valid.shape
    t = noise.stratified_times(key_time, (batch, times_per_row), s.time_offset)
    t_BL = jnp.repeat(t, length // times_per_row, axis=1)
    masked = noise.draw_masks(key_mask, noise.alpha(t_BL, s.noise_alpha_0), valid)
    weight = jnp.ones_like(t_BL) if s.low_variance else noise.elbo_weight(t_BL, s.noise_alpha_0)
    return masked, jnp.where(masked, weight, 0.0)


def diffusion_in_text_order(
    s: PhaseSettings, label, key, x, valid, *, times_per_row=1
) -> LabelledBatch:
    """Draws masks and weights, and returns label(x, valid, masked, weight=…)."""
    key_noise, _ = jax.random.split(key)
    masked, weight = _noise(s, key_noise, valid, times_per_row)
    return label(x, valid, masked, weight=weight)


def _diffusion_shuffled(s: PhaseSettings, label, key, x, valid) -> LabelledBatch:
    """Draws masks, weights and a random order with clean tokens first, and returns
    label(x, valid, masked, order, weight)."""
    key_noise, key_order = jax.random.split(key)
    masked, weight = _noise(s, key_noise, valid, times_per_row=1)
    order_BL = orders.clean_first_random(key_order, masked, valid)
    return label(x, valid, masked, order_BL, weight)


def _sequential(
    s: PhaseSettings, label, key, x, valid, *, clean_in_text_order: bool
) -> LabelledBatch:
    """Masks tokens with probability 1 − α₀, orders them left to right after the clean ones, and
    returns label(x, valid, masked, order, weight)."""
    key_mask, key_order = jax.random.split(key)
    masked = noise.draw_masks(key_mask, s.noise_alpha_0, valid)
    if clean_in_text_order:
        order_BL = orders.clean_first_natural(masked, valid)
    else:
        order_BL = orders.clean_first_then_left_to_right(key_order, masked, valid)
    return label(x, valid, masked, order_BL, masked)


def two_phases(
    s: PhaseSettings, label_diffusion, label_sequential, *, clean_in_text_order: bool
) -> tuple[Phase, ...]:
    """A diffusion and a sequential phase, without a phase that has no share of the batch.

    α₀ = 1 ⇒ κ = 1 and α₀ = 0 ⇒ κ = 0. `clean_in_text_order`: see _sequential.
    """
    first, second = (
        functools.partial(label, mask=s.special.mask)
        for label in (label_diffusion, label_sequential)
    )
    diffusion = functools.partial(_diffusion_shuffled, s, first)
    sequential = functools.partial(_sequential, s, second, clean_in_text_order=clean_in_text_order)
    kappa = {0.0: 0.0, 1.0: 1.0}.get(s.alpha_0, s.kappa)
    both = (
        Phase("diffusion", kappa, diffusion, s.mean_masked),
        Phase("sequential", 1 - kappa, sequential, 1 - s.alpha_0, can_trim_queries=True),
    )
    return tuple(phase for phase in both if phase.fraction > 0)


def make_phases(
    config, special: SpecialIds, *, low_variance: bool, alpha_0=None, time_offset=None
) -> tuple[Phase, ...]:
    """The phases of `config.objective`, without phases that have no share of the batch.

    Reads objective, alpha_0, kappa, block_length and data.seq_len. `low_variance` drops the ELBO
    weight of the diffusion phase (training only).

    `alpha_0`, a traced scalar, replaces the config's α₀ while that is annealed; shapes and shares
    of the batch stay those of the config's α₀. At 0 the diffusion loss has weight 0.

    `time_offset`, a traced scalar in [0, 1), replaces the random offset of the stratified times.
    """
    settings = PhaseSettings(
        special=special,
        alpha_0=config.alpha_0,
        noise_alpha_0=config.alpha_0 if alpha_0 is None else alpha_0,
        kappa=config.kappa,
        seq_len=config.data.seq_len,
        block_length=config.block_length,
        low_variance=low_variance,
        time_offset=time_offset,
    )
    return registry.get(config.objective).phases(settings)


def is_exact(config) -> bool:
    """Whether the NELBO equals the likelihood: at α₀ = 0, neither masks nor orders are random."""
    return config.alpha_0 == 0
