"""The loss of the predicted tokens alone, against the cross-entropy of all logits."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from esolm_jax.model.linear import ParamSpec
from esolm_jax.model.lm_head import (
    Head,
    exclude_mask_token,
    nll,
    sequence_nll,
    token_nll,
    token_statistics,
    weighted_nll,
)
from esolm_jax.parallel import sharding

WIDTH, VOCAB, MASK = 6, 16, 3  # the mask token is not the last one
SIZES = ((4, 7), (2, 12))  # rows and tokens of two batches
DENSITIES = {"none": 0.0, "few": 0.1, "half": 0.5, "all": 1.0}
MESHES = {
    "tensor": (1, 1, 8, 1),
    "sequence": (1, 1, 1, 8),
    "data_fsdp_tensor": (2, 2, 2, 1),
    "fsdp_tensor_sequence": (1, 2, 2, 2),
}


def head(chunk, mask_id=MASK, dtype="float32", mesh=None):
    return Head(mask_id, chunk, ParamSpec(sharding.PARAMETERS["logits/kernel"], dtype, mesh))


def draw(density=0.5, sizes=SIZES, mask_id=MASK, bias=True, dtype=jnp.float32, rows=None):
    """(hs, params, targets, weights). Where a token has no weight, its target is the mask token.
    `rows`: only the first ones have weights."""
    rng = np.random.default_rng(round(100 * density))
    real = [i for i in range(VOCAB) if i != mask_id]
    hs, targets, weights = [], [], []
    for size in sizes:
        weight = rng.uniform(0.5, 2, size) * (rng.random(size) < density)
        weight[rows:] = 0 if rows else weight[rows:]
        hs.append(rng.normal(size=(*size, WIDTH)).astype(dtype))
        targets.append(np.where(weight, rng.choice(real, size), mask_id).astype(np.int32))
        weights.append(weight.astype(np.float32))
    params = {"kernel": rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)}
    if bias:
        params["bias"] = rng.normal(size=VOCAB).astype(np.float32)
    return tuple(hs), params, tuple(targets), tuple(weights)


def plain(hs, params, targets, weights, mask_id=MASK):
    """The same of all logits; a token without a weight is given a target that has a logit."""
    losses = []
    for h, target, weight in zip(hs, targets, weights, strict=True):
        logits = h.astype(jnp.float32) @ params["kernel"]
        logits += params.get("bias", jnp.zeros(VOCAB))[None, None]
        some = jnp.where(weight == 0, (mask_id + 1) % VOCAB, target)
        losses.append(weight * token_nll(logits, some, mask_id))
    return tuple(losses)


each_plain = jax.jit(plain)


def with_gradients(loss):
    """(hs, params, targets, weights) → losses [batches] and the gradients of their sum."""

    @jax.jit
    def run(hs, params, targets, weights):
        def total(hs, params):
            losses = loss(hs, params, targets, weights)
            return jnp.sum(losses), losses

        grads, losses = jax.grad(total, (0, 1), has_aux=True)(hs, params)
        return losses, grads

    return run


@functools.cache
def of_plain(mask_id=MASK):
    def losses(*args):
        return jnp.stack([jnp.sum(loss) for loss in plain(*args, mask_id=mask_id)])

    return with_gradients(losses)


@functools.cache
def of_head(head):
    return with_gradients(lambda *args: weighted_nll(head, *args))


def assert_close(found, wanted, tolerance=2e-6):
    """Within that part of the largest entry, array by array."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape and np.isfinite(a).all()
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("chunk", [5, 13, 1000])  # 13 divides the 52 tokens
def test_loss_and_gradients_for_any_chunk_and_any_weights(chunk):
    found, wanted = of_head(head(chunk)), of_plain()
    for density in DENSITIES.values():
        args = draw(density)
        assert_close(found(*args), wanted(*args))


def test_loss_without_gradients_is_the_same():
    """It is computed otherwise."""
    args = draw(0.5)
    found = jax.jit(lambda *args: weighted_nll(head(5), *args))(*args)
    assert_close(found, of_plain()(*args)[0])


@pytest.mark.parametrize(("mask_id", "bias"), [(0, False), (VOCAB - 1, True)])
def test_any_mask_token_with_or_without_a_bias(mask_id, bias):
    args = draw(0.3, mask_id=mask_id, bias=bias)
    losses, (dhs, grads) = of_head(head(7, mask_id))(*args)
    assert sum(np.count_nonzero(w) for w in args[3]) % 7  # so a chunk is not full
    assert_close((losses, (dhs, grads)), of_plain(mask_id)(*args))
    assert grads.keys() == args[1].keys()
    assert (np.asarray(grads["kernel"])[:, mask_id] == 0).all()


def test_nll_of_every_token_and_of_every_row():
    args = draw(0.5)
    weights, wanted = args[3], each_plain(*args)
    found = jax.jit(lambda *args: nll(head(5), *args))(*args)
    weights, found = jax.tree.map(np.asarray, (weights, found))
    assert_close(tuple(w * n for w, n in zip(weights, found, strict=True)), wanted)
    for weight, n in zip(weights, found, strict=True):
        assert (n[weight == 0] == 0).all()
    rows = jax.jit(lambda *args: sequence_nll(head(5), *args))(*args)
    assert_close(rows, tuple(np.sum(n, axis=1) for n in wanted))


def test_the_gradient_is_scaled_by_that_of_the_loss():
    hs, params, targets, weights = draw()

    def scaled(params, factor):
        return factor * jnp.sum(weighted_nll(head(5), hs, params, targets, weights))

    grad = jax.jit(jax.grad(scaled))
    once, scaled_by = grad(params, 1.0), grad(params, -3.0)
    assert_close(scaled_by, jax.tree.map(lambda g: -3 * np.asarray(g), once))


def test_a_token_without_a_weight_reaches_nothing():
    """Not even if its hidden state is not a number."""
    hs, params, targets, weights = draw(0.5)
    spoilt = tuple(
        np.where(np.asarray(w == 0)[..., None], np.float32(np.nan), h)
        for h, w in zip(hs, weights, strict=True)
    )
    run = of_head(head(5))
    wanted, found = run(hs, params, targets, weights), run(spoilt, params, targets, weights)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    for dh, weight in zip(found[1][0], weights, strict=True):
        assert (np.asarray(dh)[np.asarray(weight) == 0] == 0).all()
        assert (np.asarray(dh)[np.asarray(weight) != 0] != 0).all()
    each = jax.jit(lambda h: nll(head(5), h, params, targets, weights))
    jax.tree.map(np.testing.assert_array_equal, each(spoilt), each(hs))


def test_bfloat16_multiplies_low_and_sums_high():
    hs, params, targets, weights = draw(0.5, dtype=jnp.bfloat16)
    losses, (dhs, grads) = of_head(head(5, dtype="bfloat16"))(hs, params, targets, weights)
    assert {g.dtype for g in grads.values()} == {jnp.dtype("float32")}
    assert {dh.dtype for dh in dhs} == {jnp.dtype("bfloat16")}
    assert losses.dtype == jnp.float32
    rounded = params | {"kernel": params["kernel"].astype(jnp.bfloat16).astype(jnp.float32)}
    wanted, (dhs_wanted, grads_wanted) = of_plain()(hs, rounded, targets, weights)
    assert_close(losses, wanted)  # products of bfloat16 are exact in float32
    assert_close(grads["bias"], grads_wanted["bias"])
    assert_close((dhs, grads["kernel"]), (dhs_wanted, grads_wanted["kernel"]), 1e-2)


# On a mesh.


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_computes_what_one_device_does(name):
    """Also where all that is predicted lies on few of the devices."""
    shape = MESHES[name]
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, sharding.AXES)
    of_one, of_mesh = (
        of_head(head(5)),
        jax.jit(lambda *args: (of_head(head(5, mesh=mesh))(*args), nll(head(5, mesh=mesh), *args))),
    )
    for rows in (None, 1):
        args = draw(0.4, sizes=((8, 8), (16, 16)), rows=rows)
        found, nlls = of_mesh(*args)
        assert_close(found, of_one(*args))
        weighted = tuple(np.asarray(w) * n for w, n in zip(args[3], nlls, strict=True))
        assert_close(weighted, each_plain(*args))


@pytest.mark.parametrize("name", [None, "fsdp_tensor_sequence"])
def test_as_on_a_gpu(name, monkeypatch):
    """Its reductions in one pass, and its padded vocabulary, run here."""
    shape = MESHES.get(name, (1, 1, 1, 1))
    mesh = Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), sharding.AXES)
    args = draw(0.4, sizes=((8, 8), (16, 16)))
    statistics = jax.jit(lambda *args: token_statistics(head(5, mesh=mesh), *args))(*args)
    monkeypatch.setattr(sharding, "platform", lambda mesh: "gpu")
    of_gpu = with_gradients(lambda *args: weighted_nll(head(5, mesh=mesh), *args))
    assert_close(of_gpu(*args), of_plain()(*args))
    found = jax.jit(lambda *args: token_statistics(head(5, mesh=mesh), *args))(*args)
    assert_close(found, statistics)


@pytest.mark.parametrize("name", [None, "fsdp_tensor_sequence"])
def test_statistics_of_the_distributions(name):
    """Of each token with a weight; 0 for the others."""
    shape = MESHES.get(name, (1, 1, 1, 1))
    mesh = Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), sharding.AXES)
    args = draw(0.4, sizes=((8, 8), (16, 16)))
    found = jax.jit(lambda *args: token_statistics(head(5, mesh=mesh), *args))(*args)
    hs, params, targets, weights = args
    for h, target, weight, one in zip(hs, targets, weights, found, strict=True):
        z = exclude_mask_token(h @ params["kernel"] + params["bias"][None, None], MASK)
        p = np.asarray(jax.nn.softmax(z), np.float64)
        of_target = np.take_along_axis(p, target[..., None], axis=-1)[..., 0]
        entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)
        has = weight != 0
        with np.errstate(divide="ignore"):  # of the mask token, where there is no weight
            nll_ = -np.log(of_target)
        wanted = nll_, p.max(axis=-1), p.argmax(axis=-1) == target, entropy
        for values, right in zip(one, wanted, strict=True):
            np.testing.assert_allclose(values, np.where(has, right, 0), rtol=2e-5, atol=2e-6)
        assert 0 < np.asarray(one.is_top).sum() < has.sum()


# Memory.


def test_no_array_is_of_all_tokens_and_the_vocabulary():
    """Whatever has a vocabulary dimension holds a chunk, the kernel or the bias."""
    width, vocab, chunk, sizes = 5, 37, 8, ((4, 24), (2, 12))
    rng = np.random.default_rng(0)
    hs = tuple(jnp.asarray(rng.normal(size=(*size, width)), jnp.float32) for size in sizes)
    params = {"kernel": jnp.ones((width, vocab)), "bias": jnp.ones(vocab)}
    targets = tuple(jnp.zeros(size, jnp.int32) for size in sizes)
    weights = tuple(jnp.ones(size) for size in sizes)
    lowered = of_head(head(chunk)).lower(hs, params, targets, weights)
    for text, pattern in (
        (lowered.as_text(), r"tensor<((?:\d+x)+)\w+>"),
        (lowered.compile().as_text(), r"\w+\[((?:\d+,)*\d+)\]"),
    ):
        shapes = {tuple(map(int, re.findall(r"\d+", dims))) for dims in re.findall(pattern, text)}
        beside_vocab = {math.prod(shape) // vocab for shape in shapes if vocab in shape}
        assert beside_vocab == {1, width, chunk}
        assert any(sum(map(math.prod, sizes)) in shape for shape in shapes)


def test_memory_of_a_large_vocabulary():
    tokens, width, vocab = (8, 256), 64, 50_000
    args = (
        (jax.ShapeDtypeStruct((*tokens, width), jnp.float32),),
        {"kernel": jax.ShapeDtypeStruct((width, vocab), jnp.float32)},
        (jax.ShapeDtypeStruct(tokens, jnp.int32),),
        (jax.ShapeDtypeStruct(tokens, jnp.float32),),
    )

    def full(hs, params, targets, weights):
        return jnp.sum(weights[0] * token_nll(hs[0] @ params["kernel"], targets[0], MASK))[None]

    def temporary(run):
        return run.lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert temporary(of_head(head(256))) <= 0.5 * temporary(with_gradients(full))


def test_chunk_is_no_longer_than_all_there_is():
    assert head(512).sized(40, VOCAB) == dataclasses.replace(head(512), chunk=40)
    assert head(512).sized(4000, VOCAB) == head(512)


@pytest.mark.parametrize(
    ("platform", "tokens", "vocab", "chunk"),
    [
        ("cpu", 32768, 50258, 512),
        ("cpu", 40, 50258, 40),
        ("gpu", 32768, 50258, 4096),  # an eighth of all tokens
        ("gpu", 2**18, 50258, 2**30 // 4 // 50258 // 128 * 128),  # 1 GiB of logits
        ("gpu", 2048, 50258, 512),
        ("tpu", 32768, 50258, 1280),  # 256 MiB of logits
        ("tpu", 9000, 500, 1152),  # whole lanes
    ],
)
def test_chunk_is_sized_to_the_device_and_the_batch(platform, tokens, vocab, chunk, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda mesh: platform)
    assert head(0).sized(tokens, vocab).chunk == chunk


def test_sums_over_all_tokens_are_those_that_find_the_predicted_ones():
    """XLA computes cumulative sums of constants at compile time, in quadratic time."""
    args = draw(sizes=((8, 32), (2, 32)))
    text = of_head(head(16)).lower(*args).as_text()
    sums = re.findall(r"window_dimensions = array<i64: (\d+)>", text)
    assert set(sums) == {"320"} and len(sums) <= 2
