"""The network that generates is the trained one, whatever the model is made of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import compiling
from slot_passes import LENGTH, labels, run, wanted
from styles import DIT, GPT2, LLAMA, QWEN, params_of

from esolm_jax.config import default_config
from esolm_jax.family.labels import Tokens
from esolm_jax.model import transformer as model
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine import (
    caches,
    cpu_kernels,
    decode_tpu,
    network,
    prefix_cache,
    project,
    project_gpu,
)
from esolm_jax.sampling.engine.cache import entries_of

change = dataclasses.replace
DEEP = ("dit", "llama, all parts")  # the parts of the others show in one block
MODELS = {
    "dit": DIT,
    "dit without time": change(DIT, cond_width=0),
    "dit, all parts": change(DIT, qkv_bias=True, qk_norm=True, norm_eps=0.3, attention_width=24),
    "gpt2": GPT2,
    "gpt2 with time": change(GPT2, cond_width=4),
    "gpt2 with RoPE": change(GPT2, max_positions=0, kv_heads=2),
    "llama": LLAMA,
    "llama with time": change(LLAMA, cond_width=4),
    "llama 3": change(LLAMA, rope_factor=4.0, rope_original_length=16, norm_eps=0.3),
    "qwen 2": change(LLAMA, qkv_bias=True, norm_eps=0.3),
    "qwen 3": change(LLAMA, qk_norm=True, attention_width=32, norm_eps=0.3),
    "llama, all parts": change(
        QWEN, cond_width=4, rope_factor=4.0, rope_original_length=16, max_positions=0
    ),
    "llama with positions": change(QWEN, max_positions=16),
}
MODELS = {name: change(m, blocks=2 if name in DEEP else 1) for name, m in MODELS.items()}


def assert_near(found, want):
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model(name):
    """In pieces with a cache; and in one pass without a cache, where only attention differs."""
    check_passes(name, uncached=name in DEEP)


@pytest.mark.parametrize("name", DEEP)
def test_logits_with_keys_that_are_not_interleaved(name, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "key_slots", lambda mesh: 1)
    check_passes(name, uncached=False)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("name", ["dit, all parts", "gpt2", "llama, all parts"])
def test_logits_by_the_kernels_of_a_platform(name, platform, monkeypatch):
    monkeypatch.setitem(caches.KERNELS, "cpu", (platform, True))
    monkeypatch.setattr(project, "MOST_TOKENS", 8)  # 4 rows of 2
    used, real = [], project_gpu.project
    monkeypatch.setattr(
        project_gpu, "project", lambda *args, **kwargs: used.append(1) or real(*args, **kwargs)
    )
    with compiling(fast=True):  # interpreted kernels are not what users run
        check_passes(name)
        check_passes(name, uncached=False, width=2)
    assert bool(used) == (platform == "gpu")


def test_logits_of_windows_too_wide_for_the_tpu_kernel(monkeypatch):
    monkeypatch.setitem(caches.KERNELS, "cpu", ("tpu", True))
    monkeypatch.setattr(decode_tpu, "ROWS", 0)
    with compiling(fast=True):
        check_passes("llama, all parts")


@pytest.mark.parametrize("has_mesh", [False, True])
def test_logits_of_a_padded_vocabulary(has_mesh, monkeypatch):
    """As on GPUs."""
    monkeypatch.setattr(network, "columns_multiple", lambda mesh: 128)
    config = MODELS["dit, all parts"]
    net = on_a_mesh(config)[1] if has_mesh else network.fold(config, params_of(config))
    assert net.logits.shape[1] == 128 > config.vocab_size
    assert_near(run(net, prefix_cache.NoCache(), 0, LENGTH)[0], np.asarray(wanted(config)))


def check_passes(name, *, uncached=True, width=None):
    config = MODELS[name]
    net = network.fold(config, params_of(config))
    want = np.asarray(wanted(config))
    assert np.ptp(want, axis=(0, 1)).min() > 0.1  # they depend on what is read
    if uncached:
        assert_near(run(net, caches.no_cache(None), 0, LENGTH)[0], want)
    sizes = len(want), caches.round_up(LENGTH + 5), None, True
    cache = caches._zeros.__wrapped__(config, *sizes, caches.KERNELS.get("cpu"), config.dtype)
    # Pieces of unlike sizes for some models; for the others of one size, to compile once.
    unlike = name in DEEP
    pieces = ((0, 5), (5, 5), (10, 2)) if unlike else ((0, 4), (4, 4), (8, 4))
    if width:
        pieces = [(low, width) for low in range(0, LENGTH, width)]
    for low, width in pieces:
        logits, cache = run(net, cache, low, width)
        assert_near(logits, want[:, low : low + width])


def on_a_mesh(config):
    settings = default_config().mesh
    settings.update({"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1})
    mesh, params = sharding.make_mesh(settings), params_of(config)
    placed = jax.device_put(params, sharding.parameters(mesh, params))
    return mesh, network.fold(config, placed, mesh)


@pytest.mark.parametrize("name", ["gpt2", "llama, all parts"])
def test_logits_on_a_mesh_are_those_of_the_model(name):
    config = MODELS[name]
    _, net = on_a_mesh(config)
    assert_near(run(net, prefix_cache.NoCache(), 0, LENGTH)[0], np.asarray(wanted(config)))


@pytest.mark.parametrize(("name", "has_mesh"), [("dit", False), ("llama, all parts", True)])
def test_a_long_window_attends_in_parts(name, has_mesh, monkeypatch):
    """Of equal size, and with a rest."""
    monkeypatch.setattr(prefix_cache, "QUERY_CHUNK", 4)
    fresh = jax.jit(lambda *args: run.__wrapped__(*args), static_argnums=3)  # lest it is known
    config, want = MODELS[name], np.asarray(wanted(MODELS[name]))
    mesh, net = on_a_mesh(config) if has_mesh else (None, network.fold(config, params_of(config)))
    assert (
        f"<{LENGTH // 4}x{len(want)}x"
        in fresh.lower(net, prefix_cache.NoCache(), 0, LENGTH).as_text()
    )
    assert_near(fresh(net, prefix_cache.NoCache(), 0, LENGTH)[0], want)
    cache = caches.empty_cache(config, len(want), LENGTH, mesh, aligned=True)
    for low, width in ((0, 5), (5, 7)):
        logits, cache = fresh(net, cache, low, width)
        assert_near(logits, want[:, low : low + width])


def test_every_parameter_counts():
    """Else a part that the network leaves out would not show above."""
    for name in ("dit, all parts", "gpt2 with time", "llama, all parts"):
        config = MODELS[name]
        apply, params = model.bind(config), params_of(config)
        token, position, rank = labels()
        tokens = Tokens(token, position, rank, jnp.ones_like(token, bool))
        weight = jnp.asarray(np.random.default_rng(3).normal(size=wanted(config).shape))
        loss = lambda p: jnp.sum(apply(p, tokens) * weight)  # noqa: B023, E731
        with compiling(fast=True):
            grads = jax.jit(jax.grad(loss))(params)
        for path, grad in jax.tree.leaves_with_path(grads):
            assert np.abs(grad).max() > 1e-3, jax.tree_util.keystr(path)


@pytest.mark.parametrize("place", ["", "blocks", "blocks/qkv", "logits", "final_norm", "positions"])
def test_parameters_that_it_does_not_know_are_refused(place, monkeypatch):
    """As if the model had learned a new part, and the network not."""
    known = model.modulations(GPT2, params_of(GPT2))
    monkeypatch.setattr(model, "modulations", lambda config, params: known)
    params = jax.tree.map(lambda leaf: leaf, params_of(GPT2))
    node = params
    for key in filter(None, place.split("/")):
        node = node[key]
    node["gain"] = jnp.ones((GPT2.blocks, 3))
    name = f"{place}/gain".lstrip("/")
    with pytest.raises(AssertionError, match=f"parameters that sampling does not know: {name}\\b"):
        network.fold(GPT2, params)


@pytest.mark.parametrize("kernels", [None, ("gpu", True)])
@pytest.mark.parametrize("slots", [24, 128])
@pytest.mark.parametrize("aligned", [True, False])
def test_what_a_pass_returned_lies_in_its_slots(slots, aligned, kernels, monkeypatch):
    if kernels:
        monkeypatch.setitem(caches.KERNELS, "cpu", kernels)
    config = dataclasses.replace(DIT, blocks=2)
    cache = caches.empty_cache(config, 3, slots, aligned=aligned)
    wide = [np.random.default_rng(i).random((3, 4, config.groups, 8)) for i in range(4)]
    wide = [jnp.asarray(np.repeat(a, config.head_width // 8, 3), jnp.float32) for a in wide]
    pairs = list(zip(wide[:2], wide[2:], strict=True))
    start = jnp.array([7, 7, 7] if aligned else [0, slots - 4, 9])
    token_axis = 1 if kernels else 2
    given = pairs if kernels else [tuple(jnp.moveaxis(a, 1, 2) for a in pair) for pair in pairs]
    found = cache.write(entries_of(given, start, token_axis), start)
    for block, pair in enumerate(pairs):
        for have, new in zip(slots_of(found, block), pair, strict=True):
            want = np.zeros((3, slots, config.groups, config.head_width), np.float32)
            for row, at in enumerate(start.tolist()):
                want[row, at : at + 4] = new[row]
            np.testing.assert_array_equal(have.reshape(want.shape), want)


def slots_of(cache, block):
    """Keys and values of a block, [B, S, G, K]."""
    if not isinstance(cache, prefix_cache.PrefixCache):
        return cache.keys[block], cache.values[block]
    keys, values = cache.keys[block], cache.values[block]
    keys = keys.swapaxes(3, 4).reshape(values.shape)
    return keys.swapaxes(1, 2), values.swapaxes(1, 2)
