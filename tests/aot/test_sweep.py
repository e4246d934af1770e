"""The sweep over meshes: which cases it compiles, and in which order it lists them."""

import pytest

from esolm_jax import config as config_lib
from esolm_jax.aot import sweep
from esolm_jax.errors import UserError
from esolm_jax.model.model_config import REMAT

GIB = 2.0**30


def of(config, memory: float, seconds: float, traffic: float, parameters=10**6) -> dict:
    """Figures as those of compile.measure, of a step that needs so much memory and time."""
    return {
        "mesh": {"data": -1, "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor},
        "remat": config.model.remat,
        "grad_accumulation": config.train.grad_accumulation,
        "parameters": parameters,
        "hbm": {"fits": memory <= 80 * GIB, "total": memory},
        "flops": {"ratio": 1.0},
        "collectives": {"ratio": 1.0},
        "roofline": {"step_seconds": seconds, "mfu": 0.9},
        "traffic": {"step_seconds": traffic, "mfu": 0.5},
    }


def default():
    config = config_lib.default_config()
    config.model.width, config.model.heads = 768, 12
    return config


@pytest.mark.parametrize("chips", [1, 6, 8])
def test_candidates(chips):
    """On one GPU as on many: data alone, and everything sharded."""
    found = list(sweep.candidates(default(), chips))
    meshes = {(c["mesh.fsdp"], c["mesh.tensor"]) for c in found}
    assert len(found) == len(meshes) * len(REMAT)
    assert (1, 1) in meshes
    assert meshes == {(f, t) for f in (1, 2, 4, 8) for t in (1, 2, 4) if chips % (f * t) == 0}


def test_fewest_micro_batches_and_the_fastest_first(capsys):
    def measure(config, name, num_slices):
        assert (name, num_slices) == ("h100:8", 1)
        if config.mesh.tensor > 1:
            raise UserError("heads: must divide")
        parts, remat = config.train.grad_accumulation, config.model.remat
        memory = {"none": 150, "full": 20}.get(remat, 60) * GIB / parts
        return of(config, memory, seconds=0.1 + 0.01 * config.mesh.fsdp, traffic=0.15)

    rows = sweep.run(default(), "h100:8", 1, measure)
    assert {r["remat"]: r["grad_accumulation"] for r in rows} == {
        r: 1 + (r == "none") for r in REMAT
    }
    times = [max(r["roofline"]["step_seconds"], r["traffic"]["step_seconds"]) for r in rows]
    assert len(rows) == 4 * len(REMAT) and times == sorted(times)
    assert "left out" in capsys.readouterr().out  # meshes that divide no heads
    sweep.show(rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(rows) and "none           2    75.00" in "".join(lines)


def test_what_never_fits_comes_last_and_meshes_without_room_for_the_state_are_left_out():
    def measure(config, name, num_slices):
        if config.train.grad_accumulation > 4:
            raise UserError("train.batch_size=4: must be a multiple")
        memory = 40 if config.model.remat == "full" else 400
        return of(config, memory * GIB, seconds=1.0, traffic=1.0, parameters=20 * 10**9)

    rows = sweep.run(default(), "h100:8", 1, measure)
    assert min(f * t for f, t in {(r["mesh"]["fsdp"], r["mesh"]["tensor"]) for r in rows}) == 4
    fits = [r["hbm"]["fits"] for r in rows]
    assert any(fits) and fits == sorted(fits, reverse=True)
    assert all(r["grad_accumulation"] == (1 if r["hbm"]["fits"] else 4) for r in rows)
