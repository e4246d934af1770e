"""Weights and caches of 8 bits give what their codes and scales stand for, near the model's."""

import contextlib
import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from random_run import ADALN, make_run
from slot_passes import LENGTH, labels, run, wanted
from styles import DIT, QWEN, params_of
from tiny_run import command

import esolm_jax
from esolm_jax import memory_limit
from esolm_jax.config import default_config
from esolm_jax.errors import UserError
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine import caches, cpu_kernels, network, quantize
from esolm_jax.sampling.engine.choose import TokenSampler
from esolm_jax.sampling.engine.quantize import Quantized
from esolm_jax.sampling.generate import check
from esolm_jax.sampling.loops.loop import Task, row_keys
from esolm_jax.sampling.loops.plain import Plain
from esolm_jax.sampling.plan import passes, schedule
from esolm_jax.sampling.plan.canvas import MASK, Canvas, Seed
from esolm_jax.training import restore

pytestmark = pytest.mark.fast_compile

MODELS = {
    "dit": dataclasses.replace(DIT, qkv_bias=True, qk_norm=True, norm_eps=0.3, attention_width=24),
    "llama": dataclasses.replace(
        QWEN, cond_width=4, rope_factor=4.0, rope_original_length=16, max_positions=0
    ),
}
DTYPES = list(quantize.LARGEST)
KERNELS = [None, ("gpu", True), ("tpu", True)]
ERROR = {"int8": 0.5 / 127, "float8_e4m3fn": 2**-4}  # of the largest element, of each element


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_stand_for_the_array(dtype):
    array = draw(5, 7, 3).at[2, :, 1].set(0.0)
    found = quantize.quantize(array, 1, dtype)
    assert found.codes.dtype == dtype and found.scale.shape == (5, 3)
    largest = np.abs(array).max(1)
    np.testing.assert_allclose(
        np.abs(found.codes.astype(jnp.float32)).max(1),
        np.where(largest > 0, quantize.LARGEST[dtype], 0),
    )
    error = np.abs(quantize.dequantize(found, 1) - array)
    bound = ERROR[dtype] * (
        largest[:, None] if dtype == "int8" else np.abs(array) + largest[:, None] / 400
    )
    assert (error <= 1.001 * bound).all() and error.max() > 0


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_product_is_that_of_the_dequantized_kernel(rows):
    """With loops (large kernels) and with matrix products."""
    for kernel in (draw(16, 3, 5), draw(256, 4, 80)):
        codes, h = quantize.quantize(kernel, 0, "int8"), draw(rows, 1, len(kernel), seed=1)
        want = np.einsum("bwd,dij->bwij", h, quantize.dequantize(codes, 0))
        found = jax.jit(cpu_kernels.matmul)(h, codes)
        np.testing.assert_allclose(found, want, atol=1e-4)


def empty(config, kernels, dtype, aligned=True):
    """For the rows of labels()."""
    sizes = len(labels()[0]), caches.round_up(LENGTH + 5), None, aligned, kernels
    return caches._zeros.__wrapped__(config, *sizes, dtype)


def errors(found, want):
    """Root mean square, over that of the wanted logits without their mean."""
    spread = want - want.mean(axis=-1, keepdims=True)
    return np.sqrt(np.mean((found - want) ** 2) / np.mean(spread**2))


@pytest.mark.parametrize("name", list(MODELS))
def test_logits_of_quantized_weights(name):
    config = MODELS[name]
    net = network.fold(config, params_of(config), dtype="int8")
    assert isinstance(net.logits, Quantized) and net.embedding.dtype == jnp.float32
    exact = jax.tree.map(
        lambda a: quantize.dequantize(a, 0) if isinstance(a, Quantized) else a,
        net,
        is_leaf=lambda a: isinstance(a, Quantized),
    )
    found, want = (run(of, caches.no_cache(None), 0, LENGTH)[0] for of in (net, exact))
    np.testing.assert_allclose(found, want, atol=2e-5)
    assert 1e-4 < errors(found, wanted(config)) < 0.05


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("name", "dtype"), [("dit", "float8_e4m3fn"), ("llama", "int8")])
def test_logits_of_a_quantized_cache(name, kernels, dtype):
    """The second pass reads what the codes of the first stand for."""
    config = MODELS[name]
    net = network.fold(config, params_of(config))
    _, exact = run(net, empty(config, None, config.dtype), 0, 7)
    _, cache = run(net, empty(config, kernels, dtype, aligned=kernels is None), 0, 7)
    found, _ = run(net, cache, 7, 5)

    def rounded(keys, axis):
        return quantize.dequantize(quantize.quantize(keys, axis, dtype), axis)

    exact = exact.replace(
        keys=tuple(rounded(a, 3) for a in exact.keys),
        values=tuple(rounded(a, 3) for a in exact.values),
    )
    want, _ = run(net, exact, 7, 5)
    np.testing.assert_allclose(found, want, atol=3e-5)
    assert 1e-4 < errors(found, wanted(config)[:, 7:]) < 0.1


def check_same(found, want):
    np.testing.assert_array_equal(found.text, want.text)
    generated = np.asarray(want.revealed_at) >= 0
    assert np.ptp(np.asarray(want.logits)[generated]) > 1
    np.testing.assert_allclose(found.logits, want.logits, atol=3e-5)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_texts_of_the_kernels_are_those_of_the_cpu(platform, monkeypatch):
    """Also on a mesh."""
    rows = [[MASK] * 10, [0, 2, MASK, 3] + [MASK] * 6, [MASK] * 7, [2] * 6 + [MASK] * 2]
    canvas = Canvas.of(rows, [Seed(0, row) for row in range(4)], vocab_size=4, mask_id=toy.MASK)
    config, drawn = toy.config("eso_b", 0.6, 10), schedule.ancestral(canvas, 0.6, 4)
    plan = passes.plan(config, drawn, mask_id=toy.MASK, start_token=toy.START)
    net = network.fold(toy.CONFIG, toy.PARAMS, dtype="int8")

    def run(of, mesh=None):
        keys = row_keys(canvas.seeds)
        task = Task(plan, TokenSampler(toy.MASK), keys, mesh, cache_dtype="int8")
        return Plain(task, with_logits=True).run(of)

    want = run(net)
    monkeypatch.setitem(caches.KERNELS, "cpu", (platform, True))
    check_same(run(net), want)
    settings = default_config().mesh
    settings.update({"data": 2, "fsdp": 1, "tensor": 2, "sequence": 1, "devices": 4})
    mesh = sharding.make_mesh(settings)
    on_mesh = network.fold(toy.CONFIG, toy.PARAMS, mesh, dtype="int8")
    check_same(run(on_mesh, mesh), want)


@pytest.mark.parametrize(("capability", "fits"), [("8.0", False), ("8.9", True), ("9.0", True)])
def test_float8_needs_a_gpu_that_has_it(capability, fits):
    device = types.SimpleNamespace(compute_capability=capability)
    memory_limit.check_cache_dtype("int8", device)
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match="no float8_e4m3fn"):
        memory_limit.check_cache_dtype("float8_e4m3fn", device)


def test_a_family_without_a_cache_has_none_of_8_bits():
    config = toy.config("mdlm", 1.0)
    config.sample.cache_dtype = "int8"
    with pytest.raises(UserError, match="config.sample.cache_dtype='int8': must be auto"):
        check(config)


def test_sample_rounds_weights_on_the_host(tmp_path, monkeypatch):
    """Devices hold the codes only; the texts are those of weights rounded on the devices."""
    run_of = make_run(tmp_path / "run", objective="eso_b", **ADALN)
    meshes, load = [], restore.load_trained

    def recorded(config, workdir, weights, mesh, step):
        meshes.append(mesh)
        return load(config, workdir, weights, mesh, step)

    monkeypatch.setattr(restore, "load_trained", recorded)
    axes = {"devices": 4, "data": 2, "fsdp": 1, "tensor": 2, "sequence": 1}
    args = [f"--config.mesh.{name}={size}" for name, size in axes.items()]
    args += ["--config.sample.weight_dtype=int8", "--config.sample.num_texts=4"]
    assert command("sample", f"--workdir={run_of}", *args) == 0
    assert [mesh.size for mesh in meshes] == [1]
    lines = (run_of / "samples.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    model = esolm_jax.load(run_of)
    assert texts == model.sample(num_texts=4, weight_dtype="int8")
    assert texts != model.sample(num_texts=4, temperature=0.0)


def test_memory_of_weights_rounded_on_the_host():
    """8 B parameters fit a device of 16 GB with 8 bits only."""
    sizes = {"width": 4096, "blocks": 32, "heads": 32, "kv_heads": 8, "mlp_width": 14336}
    model = ModelConfig(vocab_size=128256, cond_width=0, style="llama", dtype="bfloat16", **sizes)
    assert 7.9e9 < memory_limit.num_params(model) < 8.2e9
    mesh = types.SimpleNamespace(shape={"tensor": 1, "fsdp": 1})
    needs = memory_limit._sampled_weights("int8", model, mesh)
    held = {need.on_device: need.bytes for need in needs}
    assert held[True] < 9e9 and held[False] == 4 * memory_limit.num_params(model)
    (exact,) = memory_limit._sampled_weights("auto", model, mesh)
    assert exact.on_device and exact.bytes > 16e9
