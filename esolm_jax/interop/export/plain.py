"""The folded network under plain names, tensor by tensor: a transformer without adaLN.

Names and layout are those of sampling/engine/network.py: `embedding` [V, D], `blocks.<i>.qkv`
[D, G, R + 2, K] …, `logits` [D, V]. Models without learned positions also have `rope` [K/2], the
frequencies of the angles. This file lists the parts of a model that every runtime can compute;
models with other parts are refused.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.interop.export.shipped.plain_transformer import PARTS
from esolm_jax.model import rope
from esolm_jax.model import transformer as model_lib
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.process import prng
from esolm_jax.sampling.engine import network as network_lib
from esolm_jax.sampling.engine.network import Network

ROPE = "rope"
_OUTSIDE = {"embedding", "positions", "logits", "logits_bias"}
_STYLES = {
    "dit": {"norm": "layer", "activation": "gelu"},
    "gpt2": {"norm": "layer", "activation": "gelu"},
    "llama": {"norm": "rms", "activation": "swiglu"},
}
# Fields that the exported functions implement, or that do not change their results.
_FIELDS = {"vocab_size", "width", "blocks", "heads", "cond_width", "style", "kv_heads", "mlp_width"}
_FIELDS |= {"attention_width", "norm_eps", "qkv_bias", "qk_norm", "max_positions"}
_FIELDS |= {"rope_base", "rope_factor", "rope_original_length", "rope_scaling", "rope_low"}
_FIELDS |= {"rope_high", "rope_attention_factor", "out_bias", "mlp_bias"}
_FIELDS |= {"dropout", "dropout_bits", "dtype", "unroll", "attention", "remat"}


def in_float32(config: ModelConfig) -> ModelConfig:
    """The config with compute dtype float32, which all artefacts use."""
    return dataclasses.replace(
        config, dtype="float32", attention="chunked", remat="none", dropout=0.0
    )


def check(config: ModelConfig) -> None:
    """UserError if the model has a part that the exported functions lack."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _FIELDS and value != field.default:
            raise UserError(
                f"config.model.{field.name}={value!r}: cannot be exported yet; must be "
                f"{field.default!r}"
            )
    if config.style not in _STYLES:
        raise UserError(
            f"config.model.style={config.style!r}: cannot be exported yet; must be one of "
            f"{', '.join(_STYLES)}"
        )


def description(config: ModelConfig) -> dict:
    """The `network` argument of forward() in plain_transformer.py."""
    return {"blocks": config.blocks, "epsilon": config.norm_eps} | _STYLES[config.style]


def _fold(config: ModelConfig, params: dict) -> Network:
    network = network_lib.fold(config, params)
    names = set(_named(network))
    of_block = {f"blocks.{i}.{part}" for i in range(config.blocks) for part in PARTS}
    if unknown := names - _OUTSIDE - of_block:
        raise UserError(f"parts of the model that cannot be exported yet: {', '.join(unknown)}")
    return network


def _named(network: Network) -> dict[str, jax.Array]:
    paths = jax.tree_util.tree_leaves_with_path(network)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def shapes(config: ModelConfig, params) -> dict[str, tuple[int, ...]]:
    """Shapes by name, of parameters that have shapes. Raises UserError: a part is unknown."""
    check(config)
    network = jax.eval_shape(lambda p: _fold(in_float32(config), p), params)
    named = {name: leaf.shape for name, leaf in _named(network).items()}
    return named if config.max_positions else named | {ROPE: (config.head_width // 2,)}


def tensors(config: ModelConfig, params: dict) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 array) in the order of shapes(), folded one block at a time, so that memory
    holds the parameters and one folded block."""
    one = dataclasses.replace(in_float32(config), blocks=1)
    held: dict[str, jax.Array] = {}
    for name in shapes(config, params):
        if name == ROPE:
            yield name, np.asarray(rope.rope_frequencies(config))
            continue
        if name not in held:
            block = int(name.split(".")[1]) if name.startswith("blocks.") else None
            held = _fold_part(one, params, block, name)
        yield name, np.asarray(held.pop(name))


def _fold_part(one: ModelConfig, params: dict, block: int | None, name: str) -> dict:
    """The folded arrays of a block, or the array of this name outside the blocks. XLA computes only
    the returned arrays."""
    index = block or 0
    params = params | {"blocks": jax.tree.map(lambda a: a[index : index + 1], params["blocks"])}

    def part(params):
        arrays = _named(_fold(one, params))
        if block is None:
            return {name: arrays[name]}
        return {
            k.replace("blocks.0.", f"blocks.{block}."): a
            for k, a in arrays.items()
            if k.startswith("blocks.")
        }

    return jax.jit(part)(params)


def to_network(config: ModelConfig, weights: Mapping[str, jax.Array]) -> Network:
    """The network of `sample`, from weights by plain name."""
    params = jax.eval_shape(lambda: model_lib.init(config, prng.key(0)))
    like = jax.eval_shape(lambda p: _fold(in_float32(config), p), params)
    leaves = [weights[name] for name in _named(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
