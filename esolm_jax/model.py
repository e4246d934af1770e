"""The transformer: a pre-norm DiT that knows token labels only (DESIGN, section 3, Backbone).

Modules are Flax NNX; blocks are stacked along a leading axis N and scanned. Training and decoding
jit plain pytrees of parameters: `init` and `bind` convert between the two views.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from esolm_jax.attention import attend, dense_mask
from esolm_jax.kv_cache import KVCache
from esolm_jax.labels import Tokens

ROPE_BASE = 10_000.0
TIME_FREQUENCIES = 256


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and policies of a transformer.

    Attributes:
      vocab_size: V, the mask token included.
      width, blocks, heads: D, N, H; D must be a multiple of 2·H.
      cond_width: C, width of the time embedding behind adaLN; 0 = no adaLN (AR).
      dropout: rate, applied after attention and MLP, in training only.
      dtype: compute dtype; parameters, norms, softmax and logits are float32.
      unroll: blocks per iteration of the scan over blocks: more is faster on a CPU and slower to
        compile.
    """

    vocab_size: int
    width: int
    blocks: int
    heads: int
    cond_width: int
    dropout: float = 0.0
    dtype: str = "float32"
    unroll: int = 1


def _uniform_fan_in(key, shape, dtype=jnp.float32):
    """U(±1/√fan_in), the published (PyTorch) initialisation of linear layers."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _uniform_width(key, shape, dtype=jnp.float32):
    """U(±1/√width), for embeddings and for the bias of a layer of `width` inputs."""
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _linear(
    inputs: int, outputs: int, config: ModelConfig, rngs, *, bias=False, zero=False, dtype_out=None
):
    def bias_init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(inputs**-0.5), inputs**-0.5)

    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        kernel_init=nnx.initializers.zeros if zero else _uniform_fan_in,
        bias_init=nnx.initializers.zeros if zero else bias_init,
        preferred_element_type=dtype_out,
        rngs=rngs,
    )


def _layer_norm(config: ModelConfig, rngs):
    return nnx.LayerNorm(
        config.width,
        epsilon=1e-5,
        use_bias=False,
        use_fast_variance=False,
        dtype=jnp.float32,
        rngs=rngs,
    )


def _modulate(h, shift, scale, dtype):
    """adaLN: h · (1 + scale) + shift, rounded to the compute dtype once."""
    return (h * (1 + scale) + shift).astype(dtype)


def _dropout(key, rate: float, h):
    if key is None or rate == 0.0:
        return h
    kept = jax.random.bernoulli(key, 1 - rate, h.shape)
    return jnp.where(kept, h / (1 - rate), 0).astype(h.dtype)


def rope_angles(position_BT, head_width: int):
    """cos and sin, float32 [B, 1, T, K/2], of position · base^(−2i/K)."""
    frequency = ROPE_BASE ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angle = position_BT[:, None, :, None].astype(jnp.float32) * frequency[None, None, None]
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x_BHTK, cos, sin):
    """RoPE, half-split: the pairs are (i, i + K/2)."""
    a, b = jnp.split(x_BHTK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x_BHTK.dtype)


class TimeEmbedding(nnx.Module):
    """Sinusoids of σ through a two-layer MLP with SiLU: [B] → [B, C]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.inner = _linear(TIME_FREQUENCIES, config.cond_width, config, rngs, bias=True)
        self.outer = _linear(config.cond_width, config.cond_width, config, rngs, bias=True)

    def __call__(self, sigma_B):
        half = TIME_FREQUENCIES // 2
        frequency = ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angle = sigma_B[:, None] * frequency[None]
        waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        return self.outer(jax.nn.silu(self.inner(waves)))


class Modulation(nnx.Module):
    """adaLN: `parts` vectors [B, 1, D] (shift, scale, gate, …) from the time embedding [B, C].
    Zero-initialised; without a time embedding they are the identity (0, 0, 1, …)."""

    def __init__(self, config: ModelConfig, parts: int, rngs: nnx.Rngs):
        self.parts = parts
        self.linear = (
            _linear(config.cond_width, parts * config.width, config, rngs, bias=True, zero=True)
            if config.cond_width
            else None
        )

    def __call__(self, cond_BC):
        if self.linear is None:
            return (0.0, 0.0, 1.0, 0.0, 0.0, 1.0)[: self.parts]
        return jnp.split(self.linear(cond_BC)[:, None], self.parts, axis=-1)


class Block(nnx.Module):
    """One pre-norm block, cut where keys and values may come from a cache."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = _layer_norm(config, rngs)
        self.qkv = _linear(config.width, 3 * config.width, config, rngs)
        self.attention_out = _linear(config.width, config.width, config, rngs)
        self.mlp_norm = _layer_norm(config, rngs)
        self.mlp_in = _linear(config.width, 4 * config.width, config, rngs, bias=True)
        self.mlp_out = _linear(4 * config.width, config.width, config, rngs, bias=True)
        self.modulation = Modulation(config, 6, rngs)

    def project(self, h_BTD, modulation, cos, sin):
        """Normed, modulated h → rotated queries and keys, and values, each [B, H, T, K]."""
        shift, scale, *_ = modulation
        h = _modulate(self.attention_norm(h_BTD), shift, scale, self.config.dtype)
        batch, length, _ = h.shape
        qkv = self.qkv(h).reshape(batch, length, 3, self.config.heads, -1)
        q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2))
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def combine(self, h_BTD, attended_BHTK, modulation, dropout_key):
        """Residual of the attention, then of the MLP."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        dropout, dtype = self.config.dropout, self.config.dtype
        attended_BTD = jnp.moveaxis(attended_BHTK, 1, 2).reshape(h_BTD.shape)
        h_BTD = h_BTD + gate * _dropout(keys[0], dropout, self.attention_out(attended_BTD))
        inner = _modulate(self.mlp_norm(h_BTD), mlp_shift, mlp_scale, dtype)
        inner = jax.nn.gelu(self.mlp_in(inner), approximate=True)
        return h_BTD + mlp_gate * _dropout(keys[1], dropout, self.mlp_out(inner))


class Transformer(nnx.Module):
    """Labelled tokens → logits. `cond_width` = 0 leaves adaLN out."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.width,
            dtype=jnp.dtype(config.dtype),
            embedding_init=_uniform_width,
            rngs=rngs,
        )
        self.time = TimeEmbedding(config, rngs) if config.cond_width else None
        make = nnx.vmap(lambda rngs: Block(config, rngs), in_axes=0, out_axes=0)
        self.blocks = make(rngs.split(config.blocks))
        self.final_norm = _layer_norm(config, rngs)
        self.final_modulation = Modulation(config, 2, rngs)
        self.logits = _linear(
            config.width,
            config.vocab_size,
            config,
            rngs,
            bias=True,
            zero=True,
            dtype_out=jnp.float32,
        )

    def __call__(
        self,
        tokens: Tokens,
        *,
        cache: KVCache | None = None,
        start=0,
        predict: tuple | None = None,
        dropout_key=None,
        sigma_B=None,
    ):
        """Runs the tokens, over a cache if one is given.

        Args:
          tokens: Tokens [B, T].
          cache: if given, the tokens' keys, values and ranks are written to slots
            [start, start + T) first, and the tokens attend to the cache alone (all in context).
          start: int, may be traced.
          predict: (offset, P): logits for the tokens [offset, offset + P) only; None = all T. A
            traced offset may run past the end: the last token then stands in for the missing ones.
          dropout_key: None = no dropout.
          sigma_B: float32 [B], what the time embedding is evaluated at; None = 0, which is what
            training, likelihood and sampling all use.

        Returns:
          (logits float32 [B, P, V], mask token not yet excluded; the cache after the pass or None)
        """
        config = self.config
        keys = tokens
        if cache is not None:
            cache = cache.write_ranks(start, tokens.rank)
            keys = cache
        mask_BTS = dense_mask(tokens, keys)
        cos, sin = rope_angles(tokens.position, config.width // config.heads)
        cond_BC = self._condition(sigma_B)
        graphdef, stacked = nnx.split(self.blocks)
        seeds = None if dropout_key is None else jax.random.split(dropout_key, config.blocks)

        def block_step(carry, layer):
            h_BTD, cache = carry
            weights, index, seed = layer
            block = nnx.merge(graphdef, weights)
            modulation = block.modulation(cond_BC)
            q, k, v = block.project(h_BTD, modulation, cos, sin)
            if cache is not None:
                cache = cache.write(index, start, k, v)
                k, v = cache.key[index], cache.value[index]
            return (block.combine(h_BTD, attend(q, k, v, mask_BTS), modulation, seed), cache), None

        carry = (self.embedding(tokens.token), cache)
        layers = (stacked, jnp.arange(config.blocks), seeds)
        (h_BTD, cache), _ = jax.lax.scan(block_step, carry, layers, unroll=config.unroll)
        if predict is not None:
            h_BTD = _take(h_BTD, *predict)
        shift, scale = self.final_modulation(cond_BC)
        h_BPD = _modulate(self.final_norm(h_BTD), shift, scale, config.dtype)
        return self.logits(h_BPD), cache

    def _condition(self, sigma_B):
        if self.time is None:
            return None
        return jax.nn.silu(self.time(jnp.zeros((1,)) if sigma_B is None else sigma_B))


def _take(h_BTD, offset, count: int):
    if isinstance(offset, int):
        return h_BTD[:, offset : offset + count]
    return jnp.take(h_BTD, offset + jnp.arange(count), axis=1, mode="clip")


def init(config: ModelConfig, key) -> dict:
    """Freshly initialised parameters: a plain nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(key)), nnx.Param))


def bind(config: ModelConfig):
    """Returns apply(params, tokens, **kwargs) → (logits, cache), pure; see Transformer.__call__."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))

    def apply(params, tokens, **kwargs):
        return nnx.merge(graphdef, params)(tokens, **kwargs)

    return apply
