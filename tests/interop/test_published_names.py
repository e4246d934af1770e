"""The loader of published weights: names, prefixes, what does not fit, seeds."""

import jax
import numpy as np
import pytest
from golden_files import HEADS, vectors

from esolm_jax.errors import UserError
from esolm_jax.interop.published import names as published_names

pytestmark = pytest.mark.fast_compile


def weights(name="weights_dit"):
    return dict(vectors(name))


@pytest.mark.parametrize("name", ["weights_dit", "weights_ar"])
def test_published_names_round_trip_bit_for_bit(name):
    want = weights(name)
    got = published_names.to_published(published_names.load(want, HEADS).params)
    assert got.keys() == want.keys() - {"rotary_emb.inv_freq"}
    for key, array in got.items():
        np.testing.assert_array_equal(array, want[key])


def test_prefix_makes_no_difference():
    plain = published_names.load(weights(), HEADS)
    prefixed = published_names.load({f"backbone.{k}": v for k, v in weights().items()}, HEADS)
    assert prefixed.config == plain.config
    same = jax.tree.map(np.array_equal, prefixed.params, plain.params)
    assert all(jax.tree.leaves(same))


def test_sizes_are_read_off_the_shapes():
    config = published_names.load(weights("weights_ar"), HEADS).config
    assert (config.vocab_size, config.width, config.blocks, config.cond_width) == (67, 64, 2, 0)
    assert published_names.load(weights(), HEADS).config.cond_width == 32


def test_missing_left_over_and_misshapen_tensors_are_named():
    missing, extra, shape = weights(), weights(), weights()
    del missing["blocks.1.attn_out.weight"]
    extra["blocks.0.gate"] = np.zeros(3)
    shape["output_layer.linear.bias"] = np.zeros(5, np.float32)
    for broken, told in (
        (missing, "missing tensors: blocks.1.attn_out.weight"),
        (extra, "blocks.0.gate"),
        (shape, r"output_layer.linear.bias: shape \(5,\) here, \(67,\) in the model"),
        ({"a": np.zeros(1)}, "vocab_embed.embedding"),
    ):
        with pytest.raises(UserError, match=told):
            published_names.load(broken, HEADS)
    with pytest.raises(UserError, match="num_heads=5"):
        published_names.load(weights(), 5)


def test_a_seed_is_an_int_or_a_key():
    model = published_names.load(weights(), HEADS)
    order, sizes = np.array([[2, 0, 3, 1]] * 2), [2, 1, 1]
    texts = [model.sample(order, sizes, rng=seed) for seed in (7, np.int64(7), jax.random.key(7))]
    for text in texts:
        np.testing.assert_array_equal(text, texts[0])
    assert texts[0].shape == (2, 4) and (np.asarray(texts[0]) != model.mask_id).all()
    assert (np.asarray(model.sample(order, sizes, rng=8)) != np.asarray(texts[0])).any()
    with pytest.raises(UserError, match="permutation"):
        model.sample(np.zeros((2, 4), int), sizes, rng=0)
    with pytest.raises(UserError, match="sum to the length 4"):
        model.sample(order, [2, 1], rng=0)
