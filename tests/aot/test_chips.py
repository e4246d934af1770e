"""Which chip a device is, and what a step costs on it."""

import types

import numpy as np
import pytest
import toy

from esolm_jax.aot import lower_bound
from esolm_jax.aot.chips import CHIPS, of_device
from esolm_jax.family.phase import make_phases
from esolm_jax.model.model_config import ModelConfig

MODEL = ModelConfig(vocab_size=5, width=8, blocks=2, heads=2, cond_width=0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"), ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"),
    ],
)  # fmt: skip
def test_chip_of_a_device(kind, name):
    assert of_device(kind) is CHIPS[name]


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "",
        "TPU v4 lite",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA L4",
    ],
)
def test_unknown_device_is_no_chip(kind):
    assert of_device(kind) is None


def test_every_chip_is_some_device():
    kinds = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "NVIDIA A100-SXM4-80GB")
    known = [of_device(kind) for kind in (*kinds, "NVIDIA H100 80GB HBM3", "NVIDIA H200")]
    assert known == list(CHIPS.values())


@pytest.mark.parametrize(("kind", "peak"), [("NVIDIA H200", 989e12), ("cpu", None)])
def test_cost_of_a_step(kind, peak):
    config = toy.config("mdlm", 1.0, 12, 4)
    config.train.batch_size = 8
    phases = make_phases(config, toy.SPECIAL, low_variance=False)
    mesh = types.SimpleNamespace(
        devices=np.array([[types.SimpleNamespace(device_kind=kind)] * 2] * 2), size=4
    )
    built = types.SimpleNamespace(model=MODEL, mesh=mesh)
    cost = lower_bound.step_cost(types.SimpleNamespace(config=config, built=built, phases=phases))
    (phase,) = phases
    row = lower_bound.flops(MODEL, lower_bound.row(config, phase))
    assert cost.flops == pytest.approx(8 * sum(row.values()))
    assert (cost.tokens, cost.devices, cost.peak_flops) == (8 * 12, 4, peak)
