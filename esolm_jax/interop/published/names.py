"""Weights of the published implementation: its parameter names ↔ our pytree, and a loaded model."""

import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.family import eso_b
from esolm_jax.family.labels import Tokens
from esolm_jax.interop import fit
from esolm_jax.model import finite
from esolm_jax.model import transformer as model_lib
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.process import prng
from esolm_jax.sampling.engine import network
from esolm_jax.sampling.engine.choose import TokenSampler
from esolm_jax.sampling.loops.loop import Task
from esolm_jax.sampling.loops.plain import Plain
from esolm_jax.sampling.plan import passes
from esolm_jax.sampling.plan.schedule import Schedule

# (published name, our path, whether to transpose). PyTorch's Linear is (out, in).
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
INV_FREQ = "rotary_emb.inv_freq"
CONSTANTS = (INV_FREQ,)  # stored with the parameters


def model_config(weights: Mapping[str, np.ndarray], num_heads: int) -> ModelConfig:
    """Sizes, from the shapes; adaLN if there is a time embedding."""
    vocab_size, width = weights["vocab_embed.embedding"].shape
    numbers = {m[1] for name in weights if (m := re.match(r"blocks\.([0-9]+)\.", name))}
    if width % (2 * num_heads):
        raise UserError(f"num_heads={num_heads}: the width {width} must be a multiple of 2 x heads")
    time = weights.get("sigma_map.mlp.0.weight")
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        blocks=len(numbers),
        heads=num_heads,
        cond_width=0 if time is None or not time.shape else time.shape[0],
    )


def check_config(model) -> None:
    """UserError if the published code does not support the model; `model` is config.model."""
    allowed = {
        "style": ("dit",),
        "kv_heads": (0, model.heads),
        "mlp_width": (0, 4 * model.width),
        "attention_width": (0, model.width),
        "norm_eps": (1e-5,),
        "qkv_bias": (False,),
        "out_bias": (False,),
        "mlp_bias": (False,),
        "qk_norm": (False,),
        "max_positions": (0,),
        "rope_base": (10_000.0,),
        "rope_factor": (1.0,),
        "rope_attention_factor": (1.0,),
    }
    for name, values in allowed.items():
        if model[name] not in values:
            raise UserError(
                f"config.model.{name}={model[name]!r}: must be {values[0]!r} in a model with "
                "published parameter names"
            )


def inv_freq(config: ModelConfig) -> np.ndarray:
    """The constant INV_FREQ: float32 [K/2]."""
    exponents = np.arange(0, config.head_width, 2, dtype=np.float32) / np.float32(config.head_width)
    return 1 / np.float32(config.rope_base) ** exponents


def _from_published(path: str, array, config: ModelConfig):
    """[D, 3·H·K] → [D, H, 3, K] for queries, keys and values; [D, F] → [D, 1, F] for the MLP."""
    if path == "blocks/qkv/kernel" and array.ndim == 2 and array.size == 3 * config.width**2:
        return array.reshape(config.width, 3, config.heads, -1).transpose(0, 2, 1, 3)
    return np.expand_dims(array, -2) if "mlp_in" in path else array


def _to_published(path: str, array):
    """The inverse."""
    if path == "blocks/qkv/kernel":
        return array.transpose(0, 2, 1, 3).reshape(len(array), -1)
    return np.squeeze(array, -2) if "mlp_in" in path else array


def to_params(
    weights: Mapping[str, np.ndarray], config: ModelConfig, where: str = "weights"
) -> dict:
    """Published names → our parameters (float32), every tensor used once and shape-checked.

    Args:
      weights: arrays, or objects with a shape for np.asarray(); read one at a time.
      where: names them in errors.

    Raises:
      UserError: tensors are missing, unexpected, of a wrong shape, or not finite.
    """
    wanted = jax.eval_shape(lambda: model_lib.init(config, prng.key(0)))
    fit.check(weights, published_shapes(wanted), where, ignored=CONSTANTS)
    params: dict = {}
    bad: list[str] = []
    for template, path, transpose in _TABLE:
        if _at(wanted, path) is None:
            continue
        stacked = "{block}" in template
        names = [template.format(block=i) for i in range(config.blocks if stacked else 1)]
        arrays = [np.asarray(weights[name]) for name in names]
        bad += finite.non_finite(dict(zip(names, arrays, strict=True)))
        if bad:  # an error follows: skip the conversion
            continue
        arrays = [_from_published(path, a.T if transpose else a, config) for a in arrays]
        node = params
        *parents, leaf = path.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = jnp.asarray(np.stack(arrays) if stacked else arrays[0], jnp.float32)
    finite.refuse(bad, len(weights), where)
    return params


def _at(tree: Mapping | None, path: str):
    """The leaf at a path, or None."""
    for key in path.split("/"):
        tree = tree.get(key) if tree is not None else None
    return tree


def published_shapes(params) -> dict[str, tuple[int, ...]]:
    """Shapes under published names and layout, of parameters that have shapes."""
    empty = jax.tree.map(lambda a: np.broadcast_to(np.float32(0), a.shape), params)
    return {name: array.shape for name, array in published(empty)}


def published(params: dict) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters (or their gradients) one after the other: (published name, array in the
    published layout)."""
    for template, path, transpose in _TABLE:
        node = _at(params, path)
        if node is None:
            continue
        value = np.asarray(node)
        for i, array in enumerate(value if "{block}" in template else [value]):
            array = _to_published(path, array)
            yield template.format(block=i), array.T if transpose else array


def to_published(params: dict) -> dict[str, np.ndarray]:
    """All of published(params)."""
    return dict(published(params))


def as_tokens(token, position, rank, in_context) -> Tokens:
    """Tokens with four labels [B, T]; Tokens are returned unchanged.

    Raises:
      UserError: a label is missing.
    """
    if isinstance(token, Tokens):
        return token
    labels = {"position": position, "rank": rank, "in_context": in_context}
    for name, label in labels.items():
        if label is None:
            raise UserError(f"{name}: missing; every token has four labels (family/labels.py)")
    token, position, rank = (jnp.asarray(a, jnp.int32) for a in (token, position, rank))
    return Tokens(token, position, rank, jnp.asarray(in_context, bool))


class PublishedModel:
    """A model with published weights.

    Attributes:
      config: ModelConfig; params: our pytree; mask_id: by default the last id of the vocabulary.
    """

    def __init__(self, config: ModelConfig, params: dict, mask_id: int | None = None):
        self.config = config
        self.params = params
        self.mask_id = config.vocab_size - 1 if mask_id is None else mask_id
        self._apply = jax.jit(model_lib.bind(config))

    def logits(self, token, position=None, rank=None, in_context=None) -> jax.Array:
        """float32 [B, T, V], mask token not yet excluded, of tokens with these labels, each
        [B, T] (int, int, int, bool); or of Tokens."""
        return self._apply(self.params, as_tokens(token, position, rank, in_context))

    def sample(self, order, step_sizes, *, rng, temperature: float = 1.0, top_p: float = 1.0):
        """Cached Eso-LM (B) decoding, through the loop of `python -m esolm_jax.sample`.

        Args:
          order: int [B, L], the text position generated at each rank, a permutation per row.
          step_sizes: ints that sum to L: how many tokens each pass generates.
          rng: a jax key or an int seed.
          temperature: 0 = greedy. top_p: nucleus, in (0, 1].

        Returns: int32 [B, L] token ids in text order.
        """
        key = prng.as_key(rng, "rng")
        order = np.asarray(order)
        schedule = Schedule(order, np.asarray(step_sizes), num_diffusion=order.shape[1])
        schedule.check()
        plan = passes.make_plan(eso_b.FAMILY, schedule, mask_id=self.mask_id)
        sampler = TokenSampler(mask_id=self.mask_id, temperature=temperature, top_p=top_p)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(order)))
        loop = Plain(Task(plan, sampler, keys))
        return loop.run(network.fold(self.config, self.params)).text


def load(
    weights: Mapping[str, np.ndarray], num_heads: int, mask_id: int | None = None
) -> PublishedModel:
    """A model from published parameter names, with or without the prefix `backbone.`; mask_id: by
    default the last id (103 in the runs on bert-base-uncased)."""
    weights = {name.removeprefix("backbone."): array for name, array in weights.items()}
    if "vocab_embed.embedding" not in weights:
        raise UserError("missing tensors: vocab_embed.embedding (is this an Eso-LM checkpoint?)")
    config = model_config(weights, num_heads)
    return PublishedModel(config, to_params(weights, config), mask_id)
