"""The loop of `sample`, as the compilers of GPUs and TPUs make it, held to its limits."""

import json
import os

import pytest
import tiny_run

from esolm_jax import compile as compile_lib
from esolm_jax import config as config_lib
from esolm_jax.aot import decoding, topology

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
    """Few kernels, all in one CUDA graph, no branches; little is moved in vain."""
    found = measure("h100:2", objective=objective, **fields)
    assert found["conditionals_in_loop"] == found["host_transfers_in_loop"] == 0
    assert (found["graphs_per_pass"], found["kernels_outside_graphs"]) == (1, 0)
    assert found["hbm"]["fits"]
    if "sample__loop" in fields:  # it also tests the drafts
        return
    assert found["kernels_per_pass"] <= 10 * BLOCKS + 25
    if "sample__steps" not in fields:  # else activations weigh
        assert 0.9 < found["bytes_ratio"] < 1.3


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
