"""Layers without collectives of their own: norms, dropout, activation, time embedding, adaLN."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from esolm_jax.model.model_config import TIME_FREQUENCIES, ModelConfig
from esolm_jax.parallel import sharding
from esolm_jax.process import prng

SQRT_8_OVER_PI = (8 / math.pi) ** 0.5


def uniform_fan_in(key, shape, dtype=jnp.float32):
    """U(±1/√fan_in), the published (PyTorch) initialisation of linear layers."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def uniform_width(key, shape, dtype=jnp.float32):
    """U(±1/√width), for embeddings."""
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def uniform_bias(inputs: int):
    """U(±1/√inputs), for the bias of a linear layer."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(inputs**-0.5), inputs**-0.5)

    return init


zeros = nnx.initializers.zeros


def rms_norm(size: int, config: ModelConfig, rngs):
    return nnx.RMSNorm(size, epsilon=config.norm_eps, dtype=jnp.float32, rngs=rngs)


def rms_normalize(config: ModelConfig, x):
    """x / √(mean(x²) + ε) over the last axis."""
    mean = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * checkpoint_name(jax.lax.rsqrt(mean + config.norm_eps), "norm")


def normalize(config: ModelConfig, h):
    """LayerNorm or RMSNorm without scale and bias: float32."""
    h = h.astype(jnp.float32)
    if config.style != "llama":
        h = h - checkpoint_name(h.mean(axis=-1, keepdims=True), "norm")
    return rms_normalize(config, h)


def normalize_in_one_pass(config: ModelConfig, h):
    """`normalize`, but below float32 both statistics of LayerNorm in one pass: E[h²] − E[h]²,
    with an error below that of 16 bits while |E[h]| is below a hundred deviations. For an h that is
    stored; where it is not, as in decoding, a GPU's compiler makes one kernel of `normalize`."""
    if config.style == "llama" or config.dtype == "float32":
        return normalize(config, h)
    h = h.astype(jnp.float32)
    mean = h.mean(axis=-1, keepdims=True)
    variance = jnp.maximum((h * h).mean(axis=-1, keepdims=True) - mean * mean, 0)
    rate = checkpoint_name(jax.lax.rsqrt(variance + config.norm_eps), "norm")
    return (h - checkpoint_name(mean, "norm")) * rate


class Norm(nnx.Module):
    """LayerNorm or RMSNorm, and adaLN: (n · g + b) · (1 + scale) + shift, with n the normalized h.

    The vectors are multiplied first. This saves a pass over the tokens and, in the backward pass, a
    sum over them.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        shape = (config.width,)
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), shape))
        has_bias = config.style == "gpt2"
        self.bias = nnx.Param(zeros(rngs.params(), shape)) if has_bias else None

    def __call__(self, h_BTD, shift, scale):
        by = self.scale[...][None, None] * (1 + scale)
        if self.bias is not None:
            shift = self.bias[...][None, None] * (1 + scale) + shift
        return (normalize_in_one_pass(self.config, h_BTD) * by + shift).astype(self.config.dtype)


def dropout(config: ModelConfig, key, h):
    """h [B, T, D] with each value set to 0 at the config's rate, others scaled up to the same mean;
    h itself without a key."""
    rate = config.dropout
    if key is None or rate == 0.0:
        return h
    if config.dropout_bits == "mix32":
        kept = prng.mix32(key, h.shape) >= round(rate * 2**32)
    else:
        # Two draws of 16 bits from each 32 bits: random bits are the main cost of dropout.
        *batch, width = h.shape
        bits = jax.random.bits(key, (*batch, width // 2), jnp.uint32)
        draws = jax.lax.bitcast_convert_type(bits, jnp.uint16).reshape(h.shape)
        kept = draws >= round(rate * 2**16)
    return h * jnp.where(kept, 1 / (1 - rate), 0).astype(h.dtype)


def activate(config: ModelConfig, parts_BTPF):
    """GELU, or SwiGLU of two parts: [B, T, gates, F] → [B, T, F]."""
    return activate_parts(config, [parts_BTPF[:, :, i] for i in range(parts_BTPF.shape[2])])


def activate_parts(config: ModelConfig, parts):
    """`activate` of a list of parts, in any shape."""
    return jax.nn.silu(parts[0]) * parts[1] if config.style == "llama" else gelu(parts[0])


def gelu(x):
    """The approximation of GELU by tanh, in float32: x · σ(√(8/π) (x + 0.044715 x³)).

    Written with σ, because XLA stores tanh in its backward pass on a GPU: a third more bytes.
    """
    wide = x.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(SQRT_8_OVER_PI * wide * (1 + 0.044715 * wide**2))).astype(x.dtype)


def _dense(inputs: int, outputs: int, config: ModelConfig, rngs, *, zero=False):
    """A layer of the time embedding: one vector for the whole batch, so it needs no ParamSpec."""
    return nnx.Linear(
        inputs,
        outputs,
        dtype=jnp.dtype(config.dtype),
        kernel_init=zeros if zero else uniform_fan_in,
        bias_init=zeros if zero else uniform_bias(inputs),
        rngs=rngs,
    )


class TimeEmbedding(nnx.Module):
    """Sinusoids of σ through a two-layer MLP with SiLU: [B] → [B, C]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.inner = _dense(TIME_FREQUENCIES, config.cond_width, config, rngs)
        self.outer = _dense(config.cond_width, config.cond_width, config, rngs)

    def __call__(self, sigma_B):
        half = TIME_FREQUENCIES // 2
        frequency = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angle = sigma_B[:, None] * frequency[None]
        waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        return self.outer(jax.nn.silu(self.inner(waves)))


class Modulation(nnx.Module):
    """adaLN: `parts` vectors [B, 1, D] (shift, scale, gate, …) from the time embedding [B, C].
    Zero-initialised; without a time embedding they are the identity (0, 0, 1, …)."""

    def __init__(self, config: ModelConfig, parts: int, mesh, rngs: nnx.Rngs):
        self.parts = parts
        self.mesh = mesh
        wide = parts * config.width
        self.linear = (
            _dense(config.cond_width, wide, config, rngs, zero=True) if config.cond_width else None
        )

    def __call__(self, cond_BC):
        if self.linear is None:
            return (0.0, 0.0, 1.0, 0.0, 0.0, 1.0)[: self.parts]
        # The kernel stays sharded; the small result is gathered.
        split = sharding.constrain(self.mesh, self.linear(cond_BC), None, "embed")
        whole = sharding.constrain(self.mesh, split, None, None)
        return jnp.split(whole[:, None], self.parts, axis=-1)
