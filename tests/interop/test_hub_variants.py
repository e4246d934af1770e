"""Variants of hub configs: the logits of `transformers`, or a refusal that names the part."""

import json
import pathlib

import jax
import numpy as np
import pytest
from hub_variants import IDS, REFUSED, SUPPORTED, config_json, tokens, weight

from esolm_jax.errors import UserError
from esolm_jax.family.labels import Tokens
from esolm_jax.interop.export import plain
from esolm_jax.interop.export.shipped import plain_transformer
from esolm_jax.interop.hub import config as hub_config
from esolm_jax.interop.hub import from_hub, rope_scaling
from esolm_jax.interop.hub import names as hub_names
from esolm_jax.model import build
from esolm_jax.model import transformer as model_lib

pytestmark = pytest.mark.fast_compile
FILE = pathlib.Path(__file__).parents[1] / "fixtures" / "hub_variants.npz"


def read_config(folder: pathlib.Path, fields: dict):
    (folder / "config.json").write_text(json.dumps(config_json(fields)))
    return hub_config.get_config(str(folder))


def model_of(folder: pathlib.Path, fields: dict):
    """(model, parameters): the variant's weights, by the names of the hub."""
    config = read_config(folder, fields)
    model = build.model_config(config, {"vocab_size": IDS, "mask_id": IDS}, "cpu")
    tied = hub_config.is_tied(config_json(fields), "config.json")
    prefix = "transformer." if model.style == "gpt2" else "model."
    parts = hub_names.hub_tensors(model, IDS, tied=tied, prefix=prefix)
    tensors = {part.name: weight(part.name, part.shape) for part in parts}
    shapes = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    from_hub.fill(params, tensors, parts, IDS, "the variant")
    return model, params


@pytest.mark.parametrize("name", SUPPORTED)
def test_logits_are_those_of_transformers(tmp_path, name):
    model, params = model_of(tmp_path, SUPPORTED[name])
    token = tokens().astype(np.int32)
    index = np.broadcast_to(np.arange(token.shape[1], dtype=np.int32), token.shape)
    labelled = Tokens(token, index, index, np.ones(token.shape, bool))
    logits = np.asarray(jax.jit(model_lib.bind(model))(params, labelled))[..., :IDS]
    np.testing.assert_allclose(logits, np.load(FILE)[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llama_all_biases_tied", "llama_yarn_bounds", "qwen3_yarn"])
def test_folded_network_computes_them_too(tmp_path, name):
    """The network of cached decoding and of exports, run by NumPy."""
    model, params = model_of(tmp_path, SUPPORTED[name])
    token = tokens()
    index = np.broadcast_to(np.arange(token.shape[1]), token.shape)
    labels = token, index, index, np.ones(token.shape, bool)
    weights = dict(plain.tensors(model, params))
    logits = plain_transformer.score(weights, plain.description(model), *labels)
    np.testing.assert_allclose(logits[..., :IDS], np.load(FILE)[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named(tmp_path, name):
    fields, part = REFUSED[name]
    with pytest.raises(UserError) as error:
        read_config(tmp_path, fields)
    assert part in str(error.value)


@pytest.mark.parametrize("name", SUPPORTED)
def test_rope_goes_out_as_it_came_in(tmp_path, name):
    """config.json written from scratch gives the same frequencies and scale."""
    config = read_config(tmp_path, SUPPORTED[name])
    again = rope_scaling.fields({"rope_parameters": rope_scaling.to_hub(config.model)}, "again")
    assert {field: config.model[field] for field in again} == again
