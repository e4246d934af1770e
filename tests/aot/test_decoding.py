"""The loop of `sample`, as the compilers of GPUs and TPUs make it, held to its limits."""

import functools
import json
import os

import jax
import pytest
import tiny_run

from esolm_jax import compile as compile_lib
from esolm_jax import config as config_lib
from esolm_jax.aot import decoding, topology
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine import kernel_cache, quantize
from esolm_jax.sampling.engine.cache import Heads, Visible
from esolm_jax.sampling.engine.project import Projection
from esolm_jax.sampling.engine.quantize import Quantized
from esolm_jax.sampling.engine.residual import Layer, Residual

BLOCKS = 2
DEVICES = {"h100:2": "jax_cuda12_plugin", "v5e:2x2": "libtpu"}


def make_config(**fields):
    """Large enough that weights and cache outweigh what does not grow with the model."""
    config = config_lib.default_config()
    config.update_from_flattened_dict(
        {
            "data.seq_len": 512,
            "data.vocab_size": 8191,
            "model.width": 512,
            "model.blocks": BLOCKS,
            "model.heads": 8,
            "model.dropout": 0.0,
            "model.dtype": "bfloat16",
            "mesh.devices": 1,
            "train.batch_size": 8,
            "sample.num_texts": 2,
        }
    )
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    config_lib.validate(config)
    return config


def measure(name, **fields):
    pytest.importorskip(DEVICES[name])
    config = make_config(**fields)
    training = compile_lib.make_training(config, name)
    return decoding.measure(config, training, topology.parse(name))


@pytest.mark.parametrize(
    ("objective", "fields"),
    [
        ("eso_b", {}),
        ("ar", {"alpha_0": 0.0, "model__cond_width": 0, "sample__num_texts": 1}),
        ("eso_b", {"alpha_0": 1.0, "sample__steps": 64}),
        ("eso_b", {"sample__loop": "speculative"}),
    ],
    ids=["eso_b", "ar, one text", "several tokens per pass", "speculative"],
)
def test_a_pass_on_a_gpu(objective, fields):
    """Few kernels, all in one CUDA graph, no branches, few bytes beyond the necessary ones."""
    found = measure("h100:2", objective=objective, **fields)
    assert found["conditionals_in_loop"] == found["host_transfers_in_loop"] == 0
    assert (found["graphs_per_pass"], found["kernels_outside_graphs"]) == (1, 0)
    assert found["hbm"]["fits"]
    if "sample__loop" in fields:  # it also tests the drafts
        return
    assert found["kernels_per_pass"] <= 6 * BLOCKS + 25
    if "sample__steps" not in fields:  # else activations weigh
        assert 0.9 < found["bytes_ratio"] < 1.3


@pytest.mark.parametrize("name", DEVICES)
def test_weights_and_cache_of_8_bits(name):
    """They halve what a pass must move, and add neither branches nor, on a GPU, kernels outside of
    its graph."""
    fields = {"sample__weight_dtype": "int8", "sample__cache_dtype": "int8"}
    whole, found = measure(name), measure(name, **fields)
    assert found["conditionals_in_loop"] == 0 == found.get("kernels_outside_graphs", 0)
    assert found["necessary_bytes_per_pass"] < 0.55 * whole["necessary_bytes_per_pass"]
    # A model as small as this has activations that weigh, on a TPU more than on a GPU.
    assert found["bytes_per_pass"] < (0.8 if name[0] == "v" else 0.65) * whole["bytes_per_pass"]


def test_a_pass_on_a_tpu():
    found = measure("v5e:2x2")
    assert found["conditionals_in_loop"] == found["host_transfers_in_loop"] == 0
    assert 0.9 < found["bytes_ratio"] < 1.3
    assert "graphs_per_pass" not in found


def test_heads_are_split_over_gpus():
    """Each device reads half of the weights and of the cache, and no cache is gathered."""
    whole = measure("h100:2")
    split = measure("h100:2", mesh__devices=2, mesh__tensor=2, mesh__data=1)
    assert split["conditionals_in_loop"] == 0
    assert split["necessary_bytes_per_pass"] < 0.6 * whole["necessary_bytes_per_pass"]
    assert split["bytes_ratio"] < 1.5
    assert not whole["collectives"]
    activations = 2 * 2 * 512 * 2  # rows, tokens, width, bytes
    assert split["collectives"]["all-reduce"] >= 2 * BLOCKS * activations
    assert 0.3 < split["flops"] / whole["flops"] < 0.7


def test_command(tmp_path, capsys, monkeypatch):
    pytest.importorskip("jax_cuda12_plugin")
    monkeypatch.chdir(tmp_path)
    command = [f"--config={tiny_run.FILE}", "--topology=h100:1", "--program=sample"]
    fields = {"mesh.devices": 1, "sample.num_texts": 3}
    assert tiny_run.command("compile", *command, *tiny_run.arguments(fields)) == 0
    figures = json.loads((tmp_path / "compile.json").read_text())
    assert figures["texts"] == 3 and figures["kernels_per_pass"] > 10
    printed = capsys.readouterr().out
    assert "CUDA graphs" in printed and "MB necessary" in printed
    assert os.path.exists("compile.json")


VARIANTS = {  # batch, window, groups, heads of a group, head width, slots, dtype, normed, rotated
    "llama, normed": (1, 2, 8, 4, 128, 1024, "bfloat16", True, True),
    "odd sizes": (3, 2, 3, 2, 24, 64, "float32", False, True),
    "no rotation": (3, 5, 4, 1, 80, 192, "float32", False, False),
    "a prompt": (2, 256, 8, 4, 64, 512, "bfloat16", False, True),
    "no cache": (2, 128, 12, 1, 64, 0, "bfloat16", False, True),
    "8 bits": (3, 2, 12, 1, 64, 256, "bfloat16", False, True),
}


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_compile(variant, name):
    pytest.importorskip(DEVICES[name])
    batch, window, groups, per_group, width, slots, dtype, normed, rotated = VARIANTS[variant]
    mesh = sharding.mesh_of(topology.devices(name)[0])

    def shape(*sizes, of="float32"):
        return jax.ShapeDtypeStruct(sizes, of, sharding=sharding.replicated(mesh))

    model = ModelConfig(9, groups * per_group * width, 2, groups * per_group, 0, kv_heads=groups)
    angle = shape(batch, window, width) if rotated else None
    heads = Heads(
        products=shape(batch, window, groups, per_group + 2, width, of=dtype),
        bias=shape(groups, per_group + 2, width),
        scale=shape(per_group + 1, width) if normed else None,
        cos=angle,
        sin=angle,
        config=model,
    )
    tokens = shape(batch, window, of="int32")
    visible = Visible(tokens, shape(batch, window, of="bool"), shape(batch, of="int32"))
    past = (shape(2, batch, slots, groups * width, of=dtype),) * 2 if slots else None
    if variant == "8 bits":
        codes = [shape(2, batch, slots, groups * width, of=code) for code in quantize.LARGEST]
        past = tuple(Quantized(code, shape(2, batch, groups, slots)) for code in codes)
    platform = topology.parse(name).platform
    run = functools.partial(kernel_cache.NoCache(mesh, platform, False).run, 1)
    with topology.compiling_for(mesh):
        text = jax.jit(run).lower(heads, visible, past).compile().as_text()
    uses_kernel = "decode_attention" in text
    assert uses_kernel or (platform == "tpu" and variant in ("a prompt", "no cache"))


PROJECTIONS = {  # tokens, terms, features, activates, added, style, dtype of the weights
    "one token": (1, 768, (12, 3, 64), False, False, "dit", "bfloat16"),
    "windows of 2": (4, 768, (1, 3072), True, True, "dit", "bfloat16"),
    "wide, SwiGLU": (3, 4096, (2, 11008), True, True, "llama", "bfloat16"),
    "int8": (2, 768, (1, 3072), True, True, "dit", "int8"),
    "float8": (2, 1000, (2, 1000), True, True, "llama", "float8_e4m3fn"),
    "odd sizes": (4, 1000, (2, 1000), True, True, "llama", "int8"),
}


@pytest.mark.parametrize("name", ["a100:1", "h100:1"])
@pytest.mark.parametrize("variant", PROJECTIONS)
def test_projections_compile(variant, name):
    pytest.importorskip("jax_cuda12_plugin")
    if variant == "float8" and name == "a100:1":
        pytest.skip("an A100 has no float8")
    tokens, terms, features, activates, added, style, dtype = PROJECTIONS[variant]
    mesh = sharding.mesh_of(*topology.devices(name))

    def shape(*sizes, of="float32"):
        return jax.ShapeDtypeStruct(sizes, of, sharding=sharding.replicated(mesh))

    h = shape(1, tokens, terms, of="bfloat16")
    kernel = shape(terms, *features, of=dtype)
    if dtype in quantize.LARGEST:
        kernel = Quantized(kernel, shape(*features))
    model = ModelConfig(9, terms, 2, 2, 0, style=style, dtype="bfloat16")
    layer = Layer(kernel, shape(*features) if activates else None, activates, model)
    parts = shape(3, 1, tokens, terms)
    residual = Residual(h, parts, shape(terms)) if added else Residual(h)
    with topology.compiling_for(mesh):
        lowered = jax.jit(Projection(mesh, "gpu")).lower(residual, layer)
        text = lowered.compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert "decode_project" in entry and " fusion(" not in entry


@pytest.mark.parametrize("name", ["a100:1", "h100:1"])
@pytest.mark.parametrize("sizes", [(2, 3072, 768), (4, 8192, 2048)])
def test_products_compile(sizes, name):
    pytest.importorskip("jax_cuda12_plugin")
    tokens, terms, columns = sizes
    mesh = sharding.mesh_of(*topology.devices(name))
    x, kernel = (
        jax.ShapeDtypeStruct(of, "bfloat16", sharding=sharding.replicated(mesh))
        for of in ((1, tokens, terms), (terms, columns))
    )
    with topology.compiling_for(mesh):
        text = jax.jit(Projection(mesh, "gpu").product).lower(x, kernel).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert "decode_product" in entry and " fusion(" not in entry
