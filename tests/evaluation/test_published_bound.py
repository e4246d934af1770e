"""`--protocol=published` from the published code's own noise: windows, batches and the whole."""

import contextlib
import dataclasses

import numpy as np
import pytest
from golden_eval import read_npz
from golden_files import model

from benchmarks import published_evaluation as benchmark
from benchmarks import published_evaluation_cases as cases_lib
from benchmarks.published_evaluation_record import Outcome, Record, collecting, recorded_noise
from esolm_jax import config as config_lib
from esolm_jax.evaluation import published_bound
from esolm_jax.evaluation.protocol import BatchNelbo
from esolm_jax.family.phase import SpecialIds
from esolm_jax.model import transformer as model_lib
from esolm_jax.model.build import BuiltModel
from esolm_jax.model.lm_head import Head
from esolm_jax.parallel import sharding

pytestmark = pytest.mark.fast_compile
MASK, BOS, ROWS, LENGTH = 66, 1, 6, 32
GOLDEN = read_npz("nelbo_split.npz")
RUNS = {  # → objective, start token
    "esob_k050": ("eso_b", "bos"),
    "esoa_k050": ("eso_a", "bos"),
    "mdlm": ("mdlm", "bos"),
    "ar_bos": ("ar", "bos"),
    "ar_none": ("ar", "none"),
}


def record_of(run: str) -> Record:
    """The vectors of a run, as the benchmark records the published code."""
    batches = []
    for i in range(len(GOLDEN[f"{run}.batch_sizes"])):
        prefix = f"{run}.b{i}."
        batch = {k.removeprefix(prefix): a for k, a in GOLDEN.items() if k.startswith(prefix)}
        found = {name: batch[name] for name in ("t", "xt", "z0") if name in batch}
        for phase in ("diffusion", "sequential"):
            if f"{phase}_sort" in batch:
                found[f"{phase}_order"] = batch[f"{phase}_sort"]
            if f"{phase}_nll" in batch:
                found[f"{phase}_nll"] = batch[f"{phase}_nll"]
        if "nll" in batch:  # of the tokens of AR
            found["diffusion_nll"] = batch["nll"]
        found |= {"x": batch["x0"], "valid": batch["valid"], "loss": batch["batch_loss"]}
        batches.append(found | {"tokens": batch["batch_tokens"]})
    return Record(batches, {"nll": float(GOLDEN[f"{run}.final_nll"])})


def estimated(run: str, record: Record):
    """Our bound of the run's windows: (result, what `collecting` found)."""
    objective, start_token = RUNS[run]
    is_ar = objective == "ar"
    golden = model("weights_ar" if is_ar else "weights_dit")
    fields = {"objective": objective, "start_token": start_token, "data.seq_len": LENGTH}
    fields["alpha_0"] = 0.0 if is_ar else float(GOLDEN[f"{run}.alpha_0"])
    config = config_lib.overridden(
        config_lib.default_config(), fields | {"eval.batch_size": ROWS, "mesh.devices": 1}
    )
    mesh = sharding.make_mesh(config.mesh)
    apply, head = model_lib.bind(golden.config, mesh), Head.of(golden.config, MASK, mesh)
    built = BuiltModel(mesh, golden.config, apply, head, SpecialIds(MASK, BOS))
    batches = []
    for batch in record.batches:
        x, valid = np.zeros((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH), bool)
        x[: len(batch["x"])], valid[: len(batch["x"])] = batch["x"], batch["valid"]
        batches.append({"x": x, "valid": valid})
    noise = contextlib.nullcontext() if is_ar else recorded_noise([record], MASK)
    with noise, collecting() as found:
        estimate = published_bound.make(config, built)
        return estimate(golden.params, batches, split={}, seed=0), found


@pytest.mark.parametrize("run", RUNS)
def test_bound_is_that_of_the_published_code(run):
    record = record_of(run)
    result, found = estimated(run, record)
    nll, sums = zip(*found, strict=True)
    np.testing.assert_allclose(
        np.concatenate(nll), np.concatenate(record.window_nll()), rtol=benchmark.TOLERANCE
    )
    for got, want in zip(sums, record.batches, strict=True):
        assert got.num_tokens == want["tokens"]
        assert got.loss == pytest.approx(float(want["loss"]), rel=benchmark.TOLERANCE)
    assert result.figures["nll_per_token"] == pytest.approx(record.final["nll"], rel=1e-5)
    assert result.figures["windows"] == len(record.windows)


def test_another_mask_is_another_bound():
    """The comparison sees one token that is masked in one code and not in the other."""
    record = record_of("mdlm")
    row = record.batches[0]["xt"] = record.batches[0]["xt"].copy()
    column = int(np.argmax(row[0] == MASK))
    row[0, column] = record.batches[0]["x"][0, column]
    _, found = estimated("mdlm", record)
    got = np.concatenate([nll for nll, _ in found])
    want = np.concatenate(record.window_nll())
    differs = np.abs(got / want - 1) > benchmark.TOLERANCE
    assert differs.nonzero()[0].tolist() == [0]


TAMPERED = {
    "windows": lambda a: np.where(np.arange(LENGTH) == 3, 5, a),
    "valid": lambda a: a & (np.arange(LENGTH) > 0),
    "window_nll": lambda parts: [part * (1 + 3e-5) for part in parts],
    "sums": lambda sums: [
        dataclasses.replace(one, diffusion_tokens=one.diffusion_tokens - 1) for one in sums
    ],
    "nll": lambda value: value * (1 - 3e-5),
}


@pytest.mark.parametrize("part", [None, *TAMPERED])
def test_comparison_sees_what_differs(part):
    record = record_of("mdlm")
    sums = [BatchNelbo.of(batch["valid"], batch["diffusion_nll"]) for batch in record.batches]
    nll = record.final["nll"]
    same = Outcome(record.windows, record.valid, record.window_nll(), sums, nll)
    changed = {part: TAMPERED[part](getattr(same, part))} if part else {}
    case = cases_lib.cases(cases_lib.models())[0]
    compared = benchmark.compare(case, record, dataclasses.replace(same, **changed))
    assert compared.agrees == (part is None)
