"""The transformer: pre-norm blocks that know token labels only (a DiT by default).

Styles: "dit" (LayerNorm, GELU, biases in the MLP, adaLN), "gpt2" (with biases in the norms and
behind the attention, too) and "llama" (RMSNorm, SwiGLU, no biases). Other parts of pretrained
models (learned positions, biases or norms of queries and keys, …) are fields of ModelConfig.

Modules are Flax NNX; blocks are stacked along a leading axis N and scanned. Training and decoding
jit plain pytrees of parameters: `init` and `bind` convert between the two views.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from esolm_jax.attention.attend import attend
from esolm_jax.family.labels import Tokens
from esolm_jax.model import layers
from esolm_jax.model.linear import Embedding, Linear, ParamSpec
from esolm_jax.model.model_config import REMAT, ModelConfig
from esolm_jax.model.rope import rope_angles, rotate
from esolm_jax.parallel import sharding


class Block(nnx.Module):
    """One pre-norm block, cut at its attention."""

    def __init__(self, config: ModelConfig, mesh: Mesh | None, rngs: nnx.Rngs):
        self.config = config
        c = config

        def linear(name: str, d_in: int, *d_out: int, bias: bool) -> Linear:
            axes = sharding.PARAMETERS[f"blocks/{name}/kernel"][1:]
            bias_init = layers.uniform_bias(d_in) if bias else None
            spec = ParamSpec(axes, c.dtype, mesh)
            # Queries, keys and values are kept rotated, unless a norm needs them as they were.
            kept = "" if name == "qkv" and not c.qk_norm else name
            options = {"init": layers.uniform_fan_in, "bias_init": bias_init, "name": kept}
            return Linear(d_in, d_out, spec, rngs, **options)

        bias = c.mlp_bias or c.style in ("dit", "gpt2")
        per_group = c.heads // c.groups + 2  # its queries, key and value
        gates = 2 if c.style == "llama" else 1
        self.attention_norm = layers.Norm(c, rngs)
        heads = c.groups, per_group, c.head_width
        self.qkv = linear("qkv", c.width, *heads, bias=c.qkv_bias)
        self.attention_out = linear(
            "attention_out",
            c.heads * c.head_width,
            c.width,
            bias=c.out_bias or c.style == "gpt2",
        )
        self.mlp_norm = layers.Norm(c, rngs)
        self.mlp_in = linear("mlp_in", c.width, gates, c.inner, bias=bias)
        self.mlp_out = linear("mlp_out", c.inner, c.width, bias=bias)
        self.modulation = layers.Modulation(c, 6, mesh, rngs)
        self.q_norm = layers.rms_norm(c.head_width, c, rngs) if c.qk_norm else None
        self.k_norm = layers.rms_norm(c.head_width, c, rngs) if c.qk_norm else None

    def project(self, hs, modulation, angles, cast):
        """Normed, modulated h → rotated queries [B, H, T, K] and keys, and values [B, G, T, K]; of
        each batch. `cast`: kernels in the compute dtype by name, or {}."""
        shift, scale, *_ = modulation
        normed = _keep("operand", (self.attention_norm(h, shift, scale) for h in hs))
        return [
            self._heads(qkv, angle)
            for qkv, angle in zip(self.qkv(normed, cast.get("qkv")), angles, strict=True)
        ]

    def _heads(self, qkv_BTGRK, angles):
        parts = qkv_BTGRK.shape[3]
        # Split, not sliced: the gradient is then a concatenation, not a sum of padded parts.
        split = jnp.split(qkv_BTGRK, (parts - 2, parts - 1), axis=3)
        q, k, v = (jnp.moveaxis(a, 1, 3) for a in split)
        q = q.reshape(len(q), -1, *q.shape[3:])
        k, v = k[:, :, 0], v[:, :, 0]
        if self.q_norm is not None:
            q, k = self.q_norm(q).astype(q.dtype), self.k_norm(k).astype(k.dtype)
        q, k = rotate(q, angles), rotate(k, angles)
        if self.config.rope_attention_factor != 1:
            q = q * self.config.rope_attention_factor**2
        if self.q_norm is not None:
            return q, k, v
        return _keep("qkv", (q, k, v))

    def combine(self, hs, attended, modulation, keys, cast):
        """Residual of the attention [B, H, T, K], then of the MLP; of each batch. `cast`: as in
        `project`."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        keys = [(None, None) if key is None else jax.random.split(key) for key in keys]
        flat = [jnp.moveaxis(a, 1, 2) for a in attended]
        flat = [a.reshape(*a.shape[:2], -1) for a in flat]
        outs = self.attention_out(tuple(flat), cast.get("attention_out"))
        hs = [
            h + gate * layers.dropout(self.config, key, out)
            for h, out, (key, _) in zip(hs, outs, keys, strict=True)
        ]
        hs = _keep("residual", hs)
        normed = _keep("operand", (self.mlp_norm(h, mlp_shift, mlp_scale) for h in hs))
        inner = self.mlp_in(normed, cast.get("mlp_in"))
        active = functools.partial(layers.activate, self.config)
        if self.config.remat == "none":
            # Only its input is kept: the rest costs more to store than to recompute.
            active = jax.checkpoint(active)
        outs = self.mlp_out(_keep("operand", (active(i) for i in inner)), cast.get("mlp_out"))
        return tuple(
            h + mlp_gate * layers.dropout(self.config, key, out)
            for h, out, (_, key) in zip(hs, outs, keys, strict=True)
        )


def _keep(name: str, arrays) -> tuple:
    """The arrays, by the name that a policy of REMAT keeps them by."""
    return tuple(checkpoint_name(a, name) for a in arrays)


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
            init=layers.uniform_width,
        )
        self.time = layers.TimeEmbedding(config, rngs) if config.cond_width else None
        make = nnx.vmap(lambda rngs: Block(config, mesh, rngs), in_axes=0, out_axes=0)
        self.blocks = make(rngs.split(config.blocks))
        self.final_norm = layers.Norm(config, rngs)
        self.final_modulation = layers.Modulation(config, 2, mesh, rngs)
        self.logits = Linear(
            config.width,
            (config.vocab_size,),
            ParamSpec(axes["logits/kernel"], config.dtype, mesh, out_dtype="float32"),
            rngs,
            init=layers.zeros,
            bias_init=layers.zeros if config.style == "dit" else None,
        )
        spec = ParamSpec(axes["positions/embedding"], config.dtype, mesh)
        self.positions = (
            Embedding(config.max_positions, config.width, spec, rngs, init=layers.uniform_width)
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
          head: False = return the inputs of the head, [B, P, D] in the compute dtype, in place of
            the logits (the loss projects only tokens with a weight).
          dropout_key: None = no dropout.
          sigma_B: float32 [B], the input of the time embedding; None = 0, as in training,
            likelihood and sampling.

        Returns:
          For each batch logits float32 [B, P, V], mask token not yet excluded.
        """
        angles = [rope_angles(b.position, self.config) for b in batches]
        cond_BC = self._condition(sigma_B)
        hs = self._run_blocks(batches, angles, cond_BC, dropout_key)
        if predict is not None:
            hs = [h[:, at : at + n] for h, (at, n) in zip(hs, predict, strict=True)]
        shift, scale = self.final_modulation(cond_BC)
        hs = tuple(self.final_norm(h, shift, scale) for h in hs)
        return self.logits(hs) if head else hs

    def _run_blocks(self, batches, angles, cond_BC, dropout_key):
        """Embedded tokens, through all blocks: [B, T, D] of each batch."""
        config = self.config
        graphdef, stacked = nnx.split(self.blocks)
        seeds = None
        if dropout_key is not None:
            seeds = jax.random.split(dropout_key, (config.blocks, len(batches)))

        is_unrolled = config.unroll >= config.blocks
        cast = self._cast_kernels() if is_unrolled and config.dtype != "float32" else {}

        def block_step(hs, layer):
            weights, seeds, cast = layer
            block = nnx.merge(graphdef, weights)
            modulation = block.modulation(cond_BC)
            attended = [
                attend(q, k, v, tokens, tokens, kind=config.attention, mesh=self.mesh)
                for tokens, (q, k, v) in zip(
                    batches, block.project(hs, modulation, angles, cast), strict=True
                )
            ]
            seeds = [None] * len(batches) if seeds is None else seeds
            return block.combine(hs, attended, modulation, seeds, cast), None

        if REMAT[config.remat] is not None:
            keep = jax.checkpoint_policies.save_only_these_names(*REMAT[config.remat])
            # Outside of a loop, the compiler could keep what it should compute again.
            block_step = jax.checkpoint(block_step, policy=keep, prevent_cse=is_unrolled)
        hs = self._embed(batches)
        with jax.named_scope("blocks"):  # aot/report.py finds their products by this name
            hs, _ = jax.lax.scan(block_step, hs, (stacked, seeds, cast), unroll=config.unroll)
        return hs

    def _cast_kernels(self) -> dict[str, jax.Array]:
        """The kernels of the blocks in the compute dtype. Unrolled blocks whose activations are
        computed again would cast theirs again."""
        linears = {n: m for n, m in vars(self.blocks).items() if isinstance(m, Linear)}
        return {
            name: jax.lax.stop_gradient(linear.kernel[...].astype(self.config.dtype))
            for name, linear in linears.items()
        }

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


@functools.lru_cache(maxsize=16)
def _graphdef(config: ModelConfig, mesh: Mesh | None):
    """The structure of the model, without parameters. Making one takes 0.1 s."""
    return nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, mesh, nnx.Rngs(0))))


def init(config: ModelConfig, key) -> dict:
    """Freshly initialised parameters: a plain nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, None, nnx.Rngs(key)), nnx.Param))


def bind(config: ModelConfig, mesh: Mesh | None = None):
    """Returns apply(params, tokens, **kwargs) → logits, pure; see Transformer.__call__.

    `tokens` is a tuple of batches, as there, or one batch alone: then so are `predict` and the
    logits. With a mesh, parameters lie on it by sharding.parameters, rows and tokens by its rules.
    """

    def apply(params, tokens, *, predict=None, **kwargs):
        model = nnx.merge(_graphdef(config, mesh), params)
        if not isinstance(tokens, Tokens):
            return model(tokens, predict=predict, **kwargs)
        return model((tokens,), predict=predict and (predict,), **kwargs)[0]

    return apply


def modulations(config: ModelConfig, params) -> tuple[tuple, tuple]:
    """adaLN's vectors at σ = 0, float32: (shift, scale, gate, mlp_shift, mlp_scale, mlp_gate) of
    the blocks, [N, D] each, and (shift, scale) of the head, [D]; numbers if there is no adaLN."""
    config = dataclasses.replace(config, dtype="float32")
    model = nnx.merge(_graphdef(config, None), params)
    cond_BC = model._condition(None)
    blockdef, stacked = nnx.split(model.blocks)
    if cond_BC is None:
        parts = layers.Modulation(config, 6, None, nnx.Rngs(0))(None)
        return tuple(jnp.full(config.blocks, part) for part in parts), parts[:2]
    one = jax.vmap(lambda weights: nnx.merge(blockdef, weights).modulation(cond_BC))(stacked)
    flat = lambda part: part.reshape(*part.shape[:-3], -1)  # noqa: E731
    return tuple(map(flat, one)), tuple(map(flat, model.final_modulation(cond_BC)))
