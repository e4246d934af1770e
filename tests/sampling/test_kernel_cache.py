"""Loops with the kernels of GPUs and TPUs, run in Python, generate the texts of the CPU's cache."""

import functools

import loops
import numpy as np
import pytest
import toy

from esolm_jax.config import default_config
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine import caches, kernel_cache, network
from esolm_jax.sampling.engine.choose import TokenSampler
from esolm_jax.sampling.loops.loop import row_keys
from esolm_jax.sampling.plan import passes, schedule
from esolm_jax.sampling.plan.canvas import MASK, Canvas, Seed

pytestmark = pytest.mark.fast_compile  # interpreted kernels are not what users run

LENGTH = 10
ROWS = [[MASK] * LENGTH, [0, 2, MASK, 3] + [MASK] * 6, [MASK] * 7, [2] * 6 + [MASK] * 2]
NETWORK = network.fold(toy.CONFIG, toy.PARAMS)


def plan(objective: str, steps: int):
    rows = [[MASK] * LENGTH, [2] * 3 + [MASK] * 5] * 2 if objective == "ar" else ROWS
    canvas = Canvas.of(rows, [Seed(0, row) for row in range(4)], vocab_size=4, mask_id=toy.MASK)
    config = toy.config(objective, 0.6, LENGTH)
    if objective == "ar":
        drawn = schedule.left_to_right(canvas)
    elif objective == "bd3":
        drawn = schedule.blockwise(canvas, toy.BLOCK, 1.0, steps)
    else:
        drawn = schedule.ancestral(canvas, 1.0 if objective == "mdlm" else 0.6, steps)
    return passes.plan(config, drawn, mask_id=toy.MASK, start_token=toy.START), canvas


LOOPS = {
    "plain": functools.partial(loops.decode, with_logits=True),
    "speculative": lambda *args, **kwargs: loops.speculate(*args, k=3, **kwargs)[0],
    "confidence": functools.partial(loops.by_confidence, cached=True, tokens_per_pass=2),
}


def run(loop: str, objective: str, steps: int, mesh=None, of=NETWORK):
    tables, canvas = plan(objective, steps)
    return LOOPS[loop](of, tables, TokenSampler(toy.MASK), row_keys(canvas.seeds), mesh=mesh)


def check(found, want):
    np.testing.assert_array_equal(found.text, want.text)
    np.testing.assert_array_equal(found.revealed_at, want.revealed_at)
    assert found.passes == want.passes
    if want.logits is not None:
        generated = np.asarray(want.revealed_at) >= 0
        assert np.ptp(np.asarray(want.logits)[generated]) > 1
        np.testing.assert_allclose(found.logits, want.logits, atol=2e-5)


@pytest.mark.parametrize(
    ("platform", "loop", "objective", "steps"),
    [
        ("gpu", "plain", "eso_b", 4),
        ("gpu", "plain", "ar", 0),
        ("gpu", "plain", "bd3", 0),
        ("gpu", "plain", "eso_a", 4),
        ("gpu", "speculative", "eso_b", 0),
        ("gpu", "confidence", "eso_b", 0),
        ("tpu", "speculative", "eso_b", 0),
    ],
)
def test_texts_and_logits_are_those_of_the_cpu(platform, loop, objective, steps, monkeypatch):
    want = run(loop, objective, steps)
    monkeypatch.setitem(caches.KERNELS, "cpu", (platform, True))
    used = []
    real = kernel_cache._attend_with
    monkeypatch.setattr(
        kernel_cache,
        "_attend_with",
        lambda *args, **kwargs: used.append(1) or real(*args, **kwargs),
    )
    check(run(loop, objective, steps), want)
    assert used


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_texts_on_a_mesh_are_those_of_one_device(platform, monkeypatch):
    want = run("plain", "eso_b", 4)
    monkeypatch.setitem(caches.KERNELS, "cpu", (platform, True))
    settings = default_config().mesh
    settings.update({"data": 2, "fsdp": 1, "tensor": 2, "sequence": 1, "devices": 4})
    mesh = sharding.make_mesh(settings)
    split = network.fold(toy.CONFIG, toy.PARAMS, mesh)
    check(run("plain", "eso_b", 4, mesh, split), want)
