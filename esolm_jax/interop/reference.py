"""Weights of the published implementation: its parameter names ↔ our pytree, and a loaded model."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax import model as model_lib
from esolm_jax.errors import UserError
from esolm_jax.labels import Tokens
from esolm_jax.sampling import decode, network, passes
from esolm_jax.sampling.choose import Choice
from esolm_jax.sampling.schedule import Schedule

# (published name, our path, is it a matrix to transpose). PyTorch's Linear is (out, in).
_BLOCK = "blocks.{block}."
_TABLE = (
    ("vocab_embed.embedding", "embedding/embedding", False),
    ("sigma_map.mlp.0.weight", "time/inner/kernel", True),
    ("sigma_map.mlp.0.bias", "time/inner/bias", False),
    ("sigma_map.mlp.2.weight", "time/outer/kernel", True),
    ("sigma_map.mlp.2.bias", "time/outer/bias", False),
    (_BLOCK + "norm1.weight", "blocks/attention_norm/scale", False),
    (_BLOCK + "attn_qkv.weight", "blocks/qkv/kernel", True),
    (_BLOCK + "attn_out.weight", "blocks/attention_out/kernel", True),
    (_BLOCK + "norm2.weight", "blocks/mlp_norm/scale", False),
    (_BLOCK + "mlp.0.weight", "blocks/mlp_in/kernel", True),
    (_BLOCK + "mlp.0.bias", "blocks/mlp_in/bias", False),
    (_BLOCK + "mlp.2.weight", "blocks/mlp_out/kernel", True),
    (_BLOCK + "mlp.2.bias", "blocks/mlp_out/bias", False),
    (_BLOCK + "adaLN_modulation.weight", "blocks/modulation/linear/kernel", True),
    (_BLOCK + "adaLN_modulation.bias", "blocks/modulation/linear/bias", False),
    ("output_layer.norm_final.weight", "final_norm/scale", False),
    ("output_layer.linear.weight", "logits/kernel", True),
    ("output_layer.linear.bias", "logits/bias", False),
    ("output_layer.adaLN_modulation.weight", "final_modulation/linear/kernel", True),
    ("output_layer.adaLN_modulation.bias", "final_modulation/linear/bias", False),
)
_CONSTANTS = ("rotary_emb.inv_freq",)  # stored beside the parameters, but not one


def model_config(weights: Mapping[str, np.ndarray], num_heads: int) -> model_lib.ModelConfig:
    """Sizes read off the shapes; adaLN if there is a time embedding."""
    vocab_size, width = weights["vocab_embed.embedding"].shape
    numbers = {int(m[1]) for name in weights if (m := re.match(r"blocks\.(\d+)\.", name))}
    if width % (2 * num_heads):
        raise UserError(f"num_heads={num_heads}: the width {width} must be a multiple of 2 x heads")
    time = weights.get("sigma_map.mlp.0.weight")
    return model_lib.ModelConfig(
        vocab_size=vocab_size,
        width=width,
        blocks=len(numbers),
        heads=num_heads,
        cond_width=0 if time is None else time.shape[0],
    )


def _from_published(path: str, array, config: model_lib.ModelConfig):
    """[D, 3·H·K] → [D, H, 3, K] for queries, keys and values; [D, F] → [D, 1, F] for the MLP."""
    if path == "blocks/qkv/kernel" and array.ndim == 2 and array.size == 3 * config.width**2:
        return array.reshape(config.width, 3, config.heads, -1).transpose(0, 2, 1, 3)
    return np.expand_dims(array, -2) if "mlp_in" in path else array


def _to_published(path: str, array):
    """The inverse."""
    if path == "blocks/qkv/kernel":
        return array.transpose(0, 2, 1, 3).reshape(len(array), -1)
    return np.squeeze(array, -2) if "mlp_in" in path else array


def to_params(weights: Mapping[str, np.ndarray], config: model_lib.ModelConfig) -> dict:
    """Published names → our parameters (float32), every tensor used once and shape-checked.

    Raises:
      UserError: a tensor is missing, left over, or of another shape than the model needs.
    """
    rest = {name: np.asarray(a) for name, a in weights.items() if name not in _CONSTANTS}
    wanted = jax.eval_shape(lambda: model_lib.init(config, jax.random.key(0)))
    params: dict = {}
    for template, path, transpose in _TABLE:
        *parents, leaf = path.split("/")
        shapes = wanted
        for key in (*parents, leaf):
            shapes = shapes.get(key) if shapes is not None else None
        if shapes is None:
            continue
        stacked = "{block}" in template
        names = [template.format(block=i) for i in range(config.blocks if stacked else 1)]
        if missing := [name for name in names if name not in rest]:
            raise UserError(f"missing tensors: {', '.join(missing)}")
        arrays = [rest.pop(name) for name in names]
        arrays = [_from_published(path, a.T if transpose else a, config) for a in arrays]
        value = np.stack(arrays) if stacked else arrays[0]
        if value.shape != shapes.shape:
            raise UserError(f"{names[0]}: shape {value.shape} here, {shapes.shape} in the model")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = jnp.asarray(value, jnp.float32)
    if rest:
        raise UserError(f"tensors that belong to no part of this model: {', '.join(sorted(rest))}")
    return params


def to_published(params: dict) -> dict[str, np.ndarray]:
    """Our parameters (or their gradients) → published names and layout."""
    weights = {}
    for template, path, transpose in _TABLE:
        node = params
        for key in path.split("/"):
            node = node.get(key) if node is not None else None
        if node is None:
            continue
        value = np.asarray(node)
        for i, array in enumerate(value if "{block}" in template else [value]):
            array = _to_published(path, array)
            weights[template.format(block=i)] = array.T if transpose else array
    return weights


class Reference:
    """A model with published weights.

    Attributes:
      config: ModelConfig; params: our pytree; mask_id: the last id of the vocabulary.
    """

    def __init__(self, config: model_lib.ModelConfig, params: dict):
        self.config = config
        self.params = params
        self.mask_id = config.vocab_size - 1
        self._apply = jax.jit(model_lib.bind(config))

    def logits(self, token, position, rank, in_context) -> jax.Array:
        """float32 [B, T, V], mask token not yet excluded, of tokens with these labels, each
        [B, T] (int, int, int, bool)."""
        labels = (jnp.asarray(a, jnp.int32) for a in (token, position, rank))
        tokens = Tokens(*labels, in_context=jnp.asarray(in_context, bool))
        return self._apply(self.params, tokens)

    def sample(self, order, step_sizes, *, rng, temperature: float = 1.0, top_p: float = 1.0):
        """Cached Eso-LM (B) decoding, through the loop of `python -m esolm_jax.sample`.

        Args:
          order: int [B, L], the text position generated at each rank, a permutation per row.
          step_sizes: ints that sum to L: how many tokens each pass generates.
          rng: a jax key or an int seed.
          temperature: 0 = greedy. top_p: nucleus, in (0, 1].

        Returns: int32 [B, L] token ids in text order.
        """
        key = rng if isinstance(rng, jax.Array) else jax.random.key(int(rng))
        order = np.asarray(order)
        schedule = Schedule(order, np.asarray(step_sizes), num_diffusion=order.shape[1])
        schedule.check()
        plan = passes.eso_b(schedule, mask_id=self.mask_id)
        choice = Choice(mask_id=self.mask_id, temperature=temperature, top_p=top_p)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(order)))
        return decode.decode(network.fold(self.config, self.params), plan, choice, keys).text


def load(weights: Mapping[str, np.ndarray], num_heads: int) -> Reference:
    """A model from published parameter names, with or without the prefix `backbone.`."""
    weights = {name.removeprefix("backbone."): array for name, array in weights.items()}
    if "vocab_embed.embedding" not in weights:
        raise UserError("missing tensors: vocab_embed.embedding (is this an Eso-LM checkpoint?)")
    config = model_config(weights, num_heads)
    return Reference(config, to_params(weights, config))
