"""Objectives: pure functions (key, x, valid) → labelled tokens, targets and weights.

A family is the way it labels tokens; the model and the loss know nothing of it. Each family has a
*labelling*, which is deterministic given what was masked and in which order, and one or two
*phases*, which draw the masks and the order and call it. See ARCHITECTURE.md.

Shapes: x int32 [B, L]; valid bool [B, L] (False = padding, at the end of the row); masked bool
[B, L] and weight float32 [B, L], in text order; order int32 [B, L], the position at each rank.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from esolm_jax.family import noise
from esolm_jax.family import order as orders
from esolm_jax.family.labels import Labelled, Layout, Tokens


@dataclasses.dataclass(frozen=True)
class Special:
    """Ids with a role: `mask` stands for a token to be predicted, `start` begins an AR text."""

    mask: int
    start: int


@dataclasses.dataclass(frozen=True)
class Phase:
    """One term of an objective.

    Attributes:
      fraction: the part of a training batch that feeds it (evaluation feeds every row to every
        phase).
      label: (key, x, valid) → Labelled.
      predicts: probability that a token is predicted, on average.
      droppable: whether query copies without a weight may be left out: nobody else reads them.
    """

    name: str
    fraction: float
    label: Callable[[jax.Array, jax.Array, jax.Array], Labelled]
    predicts: float = 1.0
    droppable: bool = False


def _take(a_BL, order_BL):
    return jnp.take_along_axis(a_BL, order_BL, axis=1)


def _index(order_BL):
    return jnp.broadcast_to(jnp.arange(order_BL.shape[1], dtype=jnp.int32), order_BL.shape)


def _stream(text_BL, order_BL, rank_BL, in_context: bool, block: int | None = None) -> Tokens:
    """One copy of the text, laid out in generation order; `block` tokens of it have one rank, or
    None if that depends on the row."""
    return Tokens(
        token=_take(text_BL, order_BL),
        position=order_BL,
        rank=rank_BL.astype(jnp.int32),
        in_context=jnp.full(order_BL.shape, in_context),
        layout=Layout(order_BL.shape[1], block=block) if block else None,
    )


def _two_streams(z: Tokens, x: Tokens, block: int | None = None) -> Tokens:
    """Query copies ‖ context, as long as each other."""
    length = x.token.shape[1]
    return z.beside(x, Layout(length, length, block) if block else None)


def _labelled(tokens: Tokens, x, valid, order_BL, weight) -> Labelled:
    return Labelled(
        tokens=tokens,
        target=_take(x, order_BL),
        weight=_take(weight, order_BL).astype(jnp.float32),
        num_tokens=jnp.sum(valid, axis=1, dtype=jnp.int32),
    )


# Labellings: deterministic.


def label_ar(x, valid, *, start: int) -> Labelled:
    """AR: x shifted right behind a start token, rank = position."""
    shifted = jnp.concatenate([jnp.full_like(x[:, :1], start), x[:, :-1]], axis=1)
    order_BL = _index(x)
    tokens = _stream(shifted, order_BL, order_BL, in_context=True, block=1)
    return _labelled(tokens, x, valid, order_BL, valid)


def label_mdlm(x, valid, masked, weight, *, mask: int) -> Labelled:
    """MDLM: z_t, all of one rank (bidirectional); padding is of a later rank, so unread."""
    order_BL = _index(x)
    z, rank = jnp.where(masked, mask, x), jnp.where(valid, 0, 1)
    tokens = _stream(z, order_BL, rank, in_context=True, block=x.shape[1])
    return _labelled(tokens, x, valid, order_BL, weight)


def label_bd3(x, valid, masked, weight, *, mask: int, block_length: int) -> Labelled:
    """BD3-LM: z_t ‖ x, rank = position // block length; padding is of a rank after all blocks."""
    order_BL = _index(x)
    num_blocks = x.shape[1] // block_length
    rank = jnp.where(valid, order_BL // block_length, num_blocks)
    z = _stream(jnp.where(masked, mask, x), order_BL, rank, in_context=False)
    tokens = _two_streams(z, _stream(x, order_BL, rank, in_context=True), block_length)
    return _labelled(tokens, x, valid, order_BL, weight)


def label_eso_b_diffusion(x, valid, masked, order_BL, weight, *, mask: int) -> Labelled:
    """Eso-LM (B), diffusion: z_t in generation order, causal in it."""
    z, rank = jnp.where(masked, mask, x), _index(order_BL)
    tokens = _stream(z, order_BL, rank, in_context=True, block=1)
    return _labelled(tokens, x, valid, order_BL, weight)


def label_eso_b_sequential(x, valid, masked, order_BL, weight, *, mask: int) -> Labelled:
    """Eso-LM (B), sequential: z ‖ x in generation order, the same ranks for both copies.

    With everything masked this is the any-order likelihood: token r of z predicts x_σ(r) given
    x_σ(<r).
    """
    rank = _index(order_BL)
    z = _stream(jnp.where(masked, mask, x), order_BL, rank, in_context=False)
    tokens = _two_streams(z, _stream(x, order_BL, rank, in_context=True), block=1)
    return _labelled(tokens, x, valid, order_BL, weight)


def _rank_clean_zero(valid, masked, order_BL):
    """Clean tokens: 0 (bidirectional); masked tokens and padding: their index in the order."""
    clean = _take(valid & ~masked, order_BL)
    return jnp.where(clean, 0, _index(order_BL))


def label_eso_a_diffusion(x, valid, masked, order_BL, weight, *, mask: int) -> Labelled:
    """Eso-LM (A), diffusion: as (B), but clean tokens see each other."""
    rank = _rank_clean_zero(valid, masked, order_BL)
    tokens = _stream(jnp.where(masked, mask, x), order_BL, rank, in_context=True)
    return _labelled(tokens, x, valid, order_BL, weight)


def label_eso_a_sequential(x, valid, masked, order_BL, weight, *, mask: int) -> Labelled:
    """Eso-LM (A), sequential: as (B), but the clean tokens of the x copy see each other."""
    z = _stream(jnp.where(masked, mask, x), order_BL, _index(order_BL), in_context=False)
    context = _stream(x, order_BL, _rank_clean_zero(valid, masked, order_BL), in_context=True)
    return _labelled(_two_streams(z, context), x, valid, order_BL, weight)


# Phases: they draw the noise.


def _diffusion_noise(key, valid, alpha_0: float, times_per_row: int, low_variance: bool):
    """Masks and weights of a diffusion phase, bool and float32 [B, L].

    `times_per_row` > 1 gives every block of a row a time of its own (BD3-LM).
    """
    key_time, key_mask = jax.random.split(key)
    batch, length = valid.shape
    t = noise.stratified_times(key_time, (batch, times_per_row))
    t_BL = jnp.repeat(t, length // times_per_row, axis=1)
    masked = noise.draw_masks(key_mask, noise.alpha(t_BL, alpha_0), valid)
    weight = jnp.ones_like(t_BL) if low_variance else noise.elbo_weight(t_BL, alpha_0)
    return masked, jnp.where(masked, weight, 0.0)


def _no_noise(label, key, x, valid):
    del key
    return label(x, valid)


def _diffusion(label, key, x, valid, *, alpha_0, low_variance, shuffled, times_per_row=1):
    key_noise, key_order = jax.random.split(key)
    masked, weight = _diffusion_noise(key_noise, valid, alpha_0, times_per_row, low_variance)
    if not shuffled:
        return label(x, valid, masked, weight=weight)
    order_BL = orders.clean_first_random(key_order, masked, valid)
    return label(x, valid, masked, order_BL, weight)


def _sequential(label, key, x, valid, *, alpha_0, natural):
    key_mask, key_order = jax.random.split(key)
    masked = noise.draw_masks(key_mask, alpha_0, valid)
    if natural:
        order_BL = orders.clean_first_natural(masked, valid)
    else:
        order_BL = orders.clean_first_then_left_to_right(key_order, masked, valid)
    return label(x, valid, masked, order_BL, masked)


def any_order(key, x, valid, *, alpha_0: float, special: Special) -> Labelled:
    """A random order σ, every token predicted from those before it in σ: −log p_σ(x)."""
    key_mask, key_order = jax.random.split(key)
    late = noise.draw_masks(key_mask, alpha_0, valid)
    order_BL = orders.clean_first_then_left_to_right(key_order, late, valid)
    return label_eso_b_sequential(x, valid, valid, order_BL, valid, mask=special.mask)


def is_exact(config) -> bool:
    """Whether the NELBO is the likelihood itself: at α₀ = 0 no mask and no order is random."""
    return config.alpha_0 == 0


def phases(config, special: Special, *, low_variance: bool, alpha_0=None) -> tuple[Phase, ...]:
    """The phases of `config.objective`, those with an empty share of the batch left out.

    Reads objective, alpha_0, kappa, block_length and data.seq_len. `low_variance` drops the ELBO
    weight of the diffusion phase (training only). α₀ = 1 ⇒ κ = 1 and α₀ = 0 ⇒ κ = 0.

    `alpha_0`, a traced scalar, is α₀ in place of the config's, as long as that is annealed; shapes
    and shares of the batch stay those of the config's. At 0 the diffusion loss has weight 0.
    """
    partial = functools.partial
    mask, target = special.mask, config.alpha_0
    alpha_0 = target if alpha_0 is None else alpha_0
    diffusion = partial(_diffusion, alpha_0=alpha_0, low_variance=low_variance)
    predicts = 1 - target / 2  # the mean of 1 − α_t
    match config.objective:
        case "ar":
            return (Phase("ar", 1.0, partial(_no_noise, partial(label_ar, start=special.start))),)
        case "mdlm":
            label = partial(label_mdlm, mask=mask)
            diffusion = partial(diffusion, label, shuffled=False)
            return (Phase("diffusion", 1.0, diffusion, predicts),)
        case "bd3":
            label = partial(label_bd3, mask=mask, block_length=config.block_length)
            times = config.data.seq_len // config.block_length
            diffusion = partial(diffusion, label, shuffled=False, times_per_row=times)
            return (Phase("diffusion", 1.0, diffusion, predicts),)
        case "eso_a":
            labels = label_eso_a_diffusion, label_eso_a_sequential
        case "eso_b":
            labels = label_eso_b_diffusion, label_eso_b_sequential
    kappa = {0.0: 0.0, 1.0: 1.0}.get(target, config.kappa)
    natural = config.objective == "eso_a"
    first, second = (partial(label, mask=mask) for label in labels)
    diffusion = partial(diffusion, first, shuffled=True)
    sequential = partial(_sequential, second, alpha_0=alpha_0, natural=natural)
    both = (
        Phase("diffusion", kappa, diffusion, predicts),
        Phase("sequential", 1 - kappa, sequential, 1 - target, droppable=True),
    )
    return tuple(phase for phase in both if phase.fraction > 0)
