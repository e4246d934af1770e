"""The transformer: pre-norm blocks that know token labels only (a DiT by default).

Styles: "dit" (LayerNorm, GELU, biases in the MLP, adaLN), "gpt2" (with biases in the norms and
behind the attention, too) and "llama" (RMSNorm, SwiGLU, no biases). What else pretrained models
have (learned positions, biases or norms of queries and keys, …) are fields of ModelConfig.

Modules are Flax NNX; blocks are stacked along a leading axis N and scanned. Training and decoding
jit plain pytrees of parameters: `init` and `bind` convert between the two views.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from esolm_jax.attention.attend import attend
from esolm_jax.family.labels import Tokens
from esolm_jax.model.linear import Embedding, Linear, ParamSpec
from esolm_jax.parallel import sharding

TIME_FREQUENCIES = 256
REMAT = {  # policy → names of the activations of a block that are kept for the backward pass
    "none": None,  # all of them
    "matmuls": ("qkv", "attention", "attention_out", "mlp_in"),
    "attention": ("attention",),
    "full": (),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and policies of a transformer.

    Attributes:
      vocab_size: V, the mask token included.
      width, blocks, heads: D, N, H.
      cond_width: C, width of the time embedding behind adaLN; 0 = no adaLN (AR).
      dropout: rate, applied after attention and MLP, in training only.
      dtype: compute dtype; parameters, norms, softmax and logits are float32.
      unroll: blocks per iteration of the scan over blocks: more is faster on a CPU and slower to
        compile.
      style: "dit", "gpt2" or "llama".
      kv_heads: G, heads of keys and values, a divisor of H; 0 = H.
      mlp_width: F; 0 = 4·D.
      attention_width: H·K, a multiple of 2·H; 0 = D.
      norm_eps: ε under the square root of norms.
      qkv_bias: whether queries, keys and values have biases (Qwen 2, GPT-2).
      qk_norm: whether each query and key is RMS-normed, over K (Qwen 3).
      max_positions: > 0 = a learned embedding of so many positions in place of RoPE (GPT-2).
      rope_base: of the angles position · base^(−2i/K).
      rope_factor, rope_original_length: > 1 = frequencies of waves much longer than
        `rope_original_length` tokens are divided by the factor (Llama 3.1); see rope_frequencies.
      attention: which of attention.KINDS computes it.
      remat: which of REMAT.
    """

    vocab_size: int
    width: int
    blocks: int
    heads: int
    cond_width: int
    dropout: float = 0.0
    dtype: str = "float32"
    unroll: int = 1
    style: str = "dit"
    kv_heads: int = 0
    mlp_width: int = 0
    attention_width: int = 0
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 0
    rope_base: float = 10_000.0
    rope_factor: float = 1.0
    rope_original_length: int = 8192
    attention: str = "chunked"
    remat: str = "none"

    @property
    def groups(self) -> int:
        """G: heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        """K."""
        return (self.attention_width or self.width) // self.heads

    @property
    def inner(self) -> int:
        """F: inner width of the MLP."""
        return self.mlp_width or 4 * self.width


def _uniform_fan_in(key, shape, dtype=jnp.float32):
    """U(±1/√fan_in), the published (PyTorch) initialisation of linear layers."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _uniform_width(key, shape, dtype=jnp.float32):
    """U(±1/√width), for embeddings."""
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _uniform_bias(inputs: int):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(inputs**-0.5), inputs**-0.5)

    return init


_zeros = nnx.initializers.zeros


def _linear(d_in: int, *d_out: int, name: str, config, mesh, rngs, bias=False):
    axes = sharding.PARAMETERS[f"blocks/{name}/kernel"][1:]
    place = ParamSpec(axes, config.dtype, mesh)
    bias_init = _uniform_bias(d_in) if bias else None
    return Linear(d_in, d_out, place, rngs, init=_uniform_fan_in, bias_init=bias_init)


def _rms_norm(size: int, config: ModelConfig, rngs):
    return nnx.RMSNorm(size, epsilon=config.norm_eps, dtype=jnp.float32, rngs=rngs)


def rms_normalize(config: ModelConfig, x):
    """x / √(mean(x²) + ε) over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps)


def normalize(config: ModelConfig, h):
    """What LayerNorm, or RMSNorm, does before its scale and bias: float32."""
    h = h.astype(jnp.float32)
    if config.style != "llama":
        h = h - h.mean(axis=-1, keepdims=True)
    return rms_normalize(config, h)


class Norm(nnx.Module):
    """LayerNorm or RMSNorm, and adaLN: (n · g + b) · (1 + scale) + shift of the standardised h, n.

    The vectors are multiplied first: that is a pass less over the tokens, and in the backward pass
    one sum over them less.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        shape = (config.width,)
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), shape))
        has_bias = config.style == "gpt2"
        self.bias = nnx.Param(_zeros(rngs.params(), shape)) if has_bias else None

    def __call__(self, h_BTD, shift, scale):
        by = self.scale[...][None, None] * (1 + scale)
        if self.bias is not None:
            shift = self.bias[...][None, None] * (1 + scale) + shift
        return (normalize(self.config, h_BTD) * by + shift).astype(self.config.dtype)


def _dropout(key, rate: float, h):
    if key is None or rate == 0.0:
        return h
    # Two draws of 16 bits from each of 32: random bits are what dropout costs.
    *batch, width = h.shape
    bits = jax.random.bits(key, (*batch, width // 2), jnp.uint32)
    draws = jax.lax.bitcast_convert_type(bits, jnp.uint16).reshape(h.shape)
    kept = draws >= round(rate * 2**16)
    return h * jnp.where(kept, 1 / (1 - rate), 0).astype(h.dtype)


def rope_frequencies(config: ModelConfig):
    """base^(−2i/K), float32 [K/2]; with a rope_factor, as Llama 3.1 scales them.

    Waves that fit more than four times in `rope_original_length` are kept, those longer than it are
    slowed down by the factor, and those between are in between.
    """
    width = config.head_width
    frequency = config.rope_base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if config.rope_factor == 1.0:
        return frequency
    waves = config.rope_original_length * frequency / (2 * math.pi)
    kept = jnp.clip((waves - 1) / (4 - 1), 0, 1)
    return frequency * (kept + (1 - kept) / config.rope_factor)


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
    if angles is None:
        return x_BHTK
    cos, sin = angles
    x = x_BHTK.astype(jnp.float32)
    return (x * cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * sin).astype(x_BHTK.dtype)


def activate(config: ModelConfig, parts_BTPF):
    """GELU, or SwiGLU of two parts: [B, T, gates, F] → [B, T, F]."""
    if config.style == "llama":
        return jax.nn.silu(parts_BTPF[:, :, 0]) * parts_BTPF[:, :, 1]
    return jax.nn.gelu(parts_BTPF[:, :, 0], approximate=True)


def _dense(inputs: int, outputs: int, config: ModelConfig, rngs, *, zero=False):
    """A layer of the time embedding: one vector for the whole batch, so it needs no Place."""
    return nnx.Linear(
        inputs,
        outputs,
        dtype=jnp.dtype(config.dtype),
        kernel_init=_zeros if zero else _uniform_fan_in,
        bias_init=_zeros if zero else _uniform_bias(inputs),
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
        # The kernel stays where it is; the small result is gathered.
        split = sharding.constrain(self.mesh, self.linear(cond_BC), None, "embed")
        whole = sharding.constrain(self.mesh, split, None, None)
        return jnp.split(whole[:, None], self.parts, axis=-1)


class Block(nnx.Module):
    """One pre-norm block, cut at its attention."""

    def __init__(self, config: ModelConfig, mesh: Mesh | None, rngs: nnx.Rngs):
        self.config = config
        c, how = config, {"config": config, "mesh": mesh, "rngs": rngs}
        bias = c.style in ("dit", "gpt2")
        per_group = c.heads // c.groups + 2  # its queries, key and value
        gates = 2 if c.style == "llama" else 1
        self.attention_norm = Norm(c, rngs)
        heads = c.groups, per_group, c.head_width
        self.qkv = _linear(c.width, *heads, name="qkv", bias=c.qkv_bias, **how)
        self.attention_out = _linear(
            c.heads * c.head_width, c.width, name="attention_out", bias=c.style == "gpt2", **how
        )
        self.mlp_norm = Norm(c, rngs)
        self.mlp_in = _linear(c.width, gates, c.inner, name="mlp_in", bias=bias, **how)
        self.mlp_out = _linear(c.inner, c.width, name="mlp_out", bias=bias, **how)
        self.modulation = Modulation(c, 6, mesh, rngs)
        self.q_norm = _rms_norm(c.head_width, c, rngs) if c.qk_norm else None
        self.k_norm = _rms_norm(c.head_width, c, rngs) if c.qk_norm else None

    def project(self, hs, modulation, angles):
        """Normed, modulated h → rotated queries [B, H, T, K] and keys, and values [B, G, T, K]; of
        each batch."""
        shift, scale, *_ = modulation
        normed = tuple(self.attention_norm(h, shift, scale) for h in hs)
        return [
            self._heads(checkpoint_name(qkv, "qkv"), angle)
            for qkv, angle in zip(self.qkv(normed), angles, strict=True)
        ]

    def _heads(self, qkv_BTGRK, angles):
        parts = qkv_BTGRK.shape[3]
        # Split, not sliced: the gradient is then put together, not summed from padded parts.
        split = jnp.split(qkv_BTGRK, (parts - 2, parts - 1), axis=3)
        q, k, v = (jnp.moveaxis(a, 1, 3) for a in split)
        q = q.reshape(len(q), -1, *q.shape[3:])
        k, v = k[:, :, 0], v[:, :, 0]
        if self.q_norm is not None:
            q, k = self.q_norm(q).astype(q.dtype), self.k_norm(k).astype(k.dtype)
        return rotate(q, angles), rotate(k, angles), v

    def combine(self, hs, attended, modulation, keys):
        """Residual of the attention [B, H, T, K], then of the MLP; of each batch."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        keys = [(None, None) if key is None else jax.random.split(key) for key in keys]
        rate = self.config.dropout
        flat = [jnp.moveaxis(a, 1, 2) for a in attended]
        flat = [a.reshape(*a.shape[:2], -1) for a in flat]
        outs = [checkpoint_name(o, "attention_out") for o in self.attention_out(tuple(flat))]
        hs = [
            h + gate * _dropout(key, rate, out)
            for h, out, (key, _) in zip(hs, outs, keys, strict=True)
        ]
        normed = tuple(self.mlp_norm(h, mlp_shift, mlp_scale) for h in hs)
        inner = [checkpoint_name(i, "mlp_in") for i in self.mlp_in(normed)]
        # Its input is all that is kept of it: the rest costs more to store than to compute again.
        active = jax.checkpoint(functools.partial(activate, self.config))
        outs = self.mlp_out(tuple(active(i) for i in inner))
        return tuple(
            h + mlp_gate * _dropout(key, rate, out)
            for h, out, (_, key) in zip(hs, outs, keys, strict=True)
        )


class Transformer(nnx.Module):
    """Labelled tokens → logits. `cond_width` = 0 leaves adaLN out."""

    def __init__(self, config: ModelConfig, mesh: Mesh | None, rngs: nnx.Rngs):
        self.config, self.mesh = config, mesh
        axes = sharding.PARAMETERS
        self.embedding = Embedding(
            config.vocab_size,
            config.width,
            ParamSpec(axes["embedding/embedding"], config.dtype, mesh),
            rngs,
            init=_uniform_width,
        )
        self.time = TimeEmbedding(config, rngs) if config.cond_width else None
        make = nnx.vmap(lambda rngs: Block(config, mesh, rngs), in_axes=0, out_axes=0)
        self.blocks = make(rngs.split(config.blocks))
        self.final_norm = Norm(config, rngs)
        self.final_modulation = Modulation(config, 2, mesh, rngs)
        self.logits = Linear(
            config.width,
            (config.vocab_size,),
            ParamSpec(axes["logits/kernel"], config.dtype, mesh, out_dtype="float32"),
            rngs,
            init=_zeros,
            bias_init=_zeros if config.style == "dit" else None,
        )
        where = ParamSpec(axes["positions/embedding"], config.dtype, mesh)
        self.positions = (
            Embedding(config.max_positions, config.width, where, rngs, init=_uniform_width)
            if config.max_positions
            else None
        )

    def __call__(
        self,
        batches: tuple[Tokens, ...],
        *,
        predict: tuple | None = None,
        head: bool = True,
        dropout_key=None,
        sigma_B=None,
    ):
        """Runs batches of tokens, which do not see each other, through the blocks together.

        Args:
          batches: Tokens [B, T], each with its own B and T.
          predict: (offset, P) for each batch: results for the tokens [offset, offset + P) only;
            None = all T.
          head: False = return what the head would project, [B, P, D] in the compute dtype, in
            place of the logits (the loss projects no more tokens than it must).
          dropout_key: None = no dropout.
          sigma_B: float32 [B], what the time embedding is evaluated at; None = 0, which is what
            training, likelihood and sampling all use.

        Returns:
          For each batch logits float32 [B, P, V], mask token not yet excluded.
        """
        config = self.config
        angles = [rope_angles(b.position, config) for b in batches]
        cond_BC = self._condition(sigma_B)
        graphdef, stacked = nnx.split(self.blocks)
        seeds = None
        if dropout_key is not None:
            seeds = jax.random.split(dropout_key, (config.blocks, len(batches)))

        def block_step(hs, layer):
            weights, seeds = layer
            block = nnx.merge(graphdef, weights)
            modulation = block.modulation(cond_BC)
            attended = [
                attend(q, k, v, tokens, tokens, kind=config.attention, mesh=self.mesh)
                for tokens, (q, k, v) in zip(
                    batches, block.project(hs, modulation, angles), strict=True
                )
            ]
            seeds = [None] * len(batches) if seeds is None else seeds
            return block.combine(hs, attended, modulation, seeds), None

        if REMAT[config.remat] is not None:
            keep = jax.checkpoint_policies.save_only_these_names(*REMAT[config.remat])
            block_step = jax.checkpoint(block_step, policy=keep, prevent_cse=False)
        hs = self._embed(batches)
        hs, _ = jax.lax.scan(block_step, hs, (stacked, seeds), unroll=config.unroll)
        if predict is not None:
            hs = [h[:, at : at + n] for h, (at, n) in zip(hs, predict, strict=True)]
        shift, scale = self.final_modulation(cond_BC)
        hs = tuple(self.final_norm(h, shift, scale) for h in hs)
        return self.logits(hs) if head else hs

    def _embed(self, batches):
        hs = self.embedding(tuple(b.token for b in batches))
        if self.positions is None:
            return hs
        places = self.positions(tuple(b.position for b in batches))
        return tuple(h + place for h, place in zip(hs, places, strict=True))

    def _condition(self, sigma_B):
        if self.time is None:
            return None
        return jax.nn.silu(self.time(jnp.zeros((1,)) if sigma_B is None else sigma_B))


def init(config: ModelConfig, key) -> dict:
    """Freshly initialised parameters: a plain nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, None, nnx.Rngs(key)), nnx.Param))


def bind(config: ModelConfig, mesh: Mesh | None = None):
    """Returns apply(params, tokens, **kwargs) → logits, pure; see Transformer.__call__.

    `tokens` is a tuple of batches, as there, or one batch alone: then so are `predict` and the
    logits. With a mesh, parameters lie on it by sharding.parameters, rows and tokens by its rules.
    """
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, mesh, nnx.Rngs(0))))

    def apply(params, tokens, *, predict=None, **kwargs):
        model = nnx.merge(graphdef, params)
        if not isinstance(tokens, Tokens):
            return model(tokens, predict=predict, **kwargs)
        return model((tokens,), predict=predict and (predict,), **kwargs)[0]

    return apply


def modulations(config: ModelConfig, params) -> tuple[tuple, tuple]:
    """adaLN's vectors at σ = 0, float32: (shift, scale, gate, mlp_shift, mlp_scale, mlp_gate) of
    the blocks, [N, D] each, and (shift, scale) of the head, [D]; numbers if there is no adaLN."""
    config = dataclasses.replace(config, dtype="float32")
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, None, nnx.Rngs(0))))
    model = nnx.merge(graphdef, params)
    cond_BC = model._condition(None)
    blockdef, stacked = nnx.split(model.blocks)
    if cond_BC is None:
        parts = Modulation(config, 6, None, nnx.Rngs(0))(None)
        return tuple(jnp.full(config.blocks, part) for part in parts), parts[:2]
    one = jax.vmap(lambda weights: nnx.merge(blockdef, weights).modulation(cond_BC))(stacked)
    flat = lambda part: part.reshape(*part.shape[:-3], -1)  # noqa: E731
    return tuple(map(flat, one)), tuple(map(flat, model.final_modulation(cond_BC)))
