"""Rotary position embeddings (RoPE)."""

import math

import jax
import jax.numpy as jnp

from esolm_jax.model.model_config import ModelConfig


def rope_frequencies(config: ModelConfig):
    """base^(−2i/K), float32 [K/2]; with a rope_factor, scaled by one of these rules.

    With w the number of waves in rope_original_length tokens:
      linear: all frequencies are divided by the factor.
      llama3: kept if w ≥ rope_high, divided if w ≤ rope_low, and interpolated in w between.
      yarn: likewise, interpolated in the index i, between the whole indices around the two bounds.
    """
    width = config.head_width
    frequency = config.rope_base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if config.rope_factor == 1.0:
        return frequency
    kept = _KEPT[config.rope_scaling](config, frequency)
    return frequency * (kept + (1 - kept) / config.rope_factor)


def _kept_llama3(config: ModelConfig, frequency):
    """The weight of the unscaled frequency, [K/2]."""
    waves = config.rope_original_length * frequency / (2 * math.pi)
    return jnp.clip((waves - config.rope_low) / (config.rope_high - config.rope_low), 0, 1)


def _kept_yarn(config: ModelConfig, frequency):
    def index(waves: float) -> float:
        """The real i whose frequency has this many waves."""
        length = config.rope_original_length / (2 * math.pi * waves)
        return config.head_width / 2 * math.log(length) / math.log(config.rope_base)

    first = max(math.floor(index(config.rope_high)), 0)
    last = min(math.ceil(index(config.rope_low)), config.head_width - 1)
    span = last - first or 1e-3
    return 1 - jnp.clip((jnp.arange(len(frequency), dtype=jnp.float32) - first) / span, 0, 1)


_KEPT = {
    "linear": lambda config, frequency: 0.0,
    "llama3": _kept_llama3,
    "yarn": _kept_yarn,
}


def rope_angles(position_BT, config: ModelConfig):
    """cos and sin, float32 [B, 1, T, K], of position · frequency, for both halves of K; the sine
    of the first half is negative. None if positions are learned."""
    if config.max_positions:
        return None
    frequency = rope_frequencies(config)
    angle = position_BT[:, None, :, None].astype(jnp.float32) * frequency[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    both = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    return jax.lax.optimization_barrier(both)  # once, not fused into every use of them


def rotate(x_BHTK, angles):
    """RoPE, half-split: the pairs are (i, i + K/2)."""
    return x_BHTK if angles is None else _rotate(x_BHTK, *angles)


@jax.custom_vjp
def _rotate(x_BHTK, cos, sin):
    # Rolled in its own dtype: a TPU stores the halves, padded to 128 lanes.
    rolled = jnp.roll(x_BHTK, x_BHTK.shape[-1] // 2, axis=-1)
    x = x_BHTK.astype(jnp.float32) * cos + rolled.astype(jnp.float32) * sin
    return x.astype(x_BHTK.dtype)


def _forward(x_BHTK, cos, sin):
    return _rotate(x_BHTK, cos, sin), (cos, sin)


def _backward(angles, g_BHTK):
    """Rotates back. Angles follow from integers and need no gradient."""
    cos, sin = angles
    return _rotate(g_BHTK, cos, -sin), None, None


_rotate.defvjp(_forward, _backward)
