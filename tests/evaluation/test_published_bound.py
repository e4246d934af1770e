"""`--protocol=published` from the published code's own noise: windows, batches and the whole."""

import contextlib
import dataclasses
import pathlib

import numpy as np
import pytest
from golden_eval import read_npz
from golden_files import model

from benchmarks import published_evaluation as benchmark
from benchmarks import published_evaluation_cases as cases_lib
from benchmarks.published_evaluation_record import Outcome, Record, collecting, recorded_noise
from esolm_jax import config as config_lib
from esolm_jax.data.text8_tokenizer import Text8
from esolm_jax.evaluation import published_bound
from esolm_jax.evaluation.protocol import BatchNelbo, published_nelbo
from esolm_jax.family.phase import SpecialIds
from esolm_jax.interop.published import names as published_names
from esolm_jax.model import transformer as model_lib
from esolm_jax.model.build import BuiltModel
from esolm_jax.model.lm_head import Head
from esolm_jax.parallel import sharding
from esolm_jax.process import prng

pytestmark = pytest.mark.fast_compile
MASK, BOS, LENGTH = 66, 1, 32  # of the golden vectors
FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
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


def golden_settings(run: str):
    """The model of a run, and fields of its config."""
    objective, start_token = RUNS[run]
    is_ar = objective == "ar"
    fields = {"objective": objective, "start_token": start_token}
    fields["alpha_0"] = 0.0 if is_ar else float(GOLDEN[f"{run}.alpha_0"])
    return model("weights_ar" if is_ar else "weights_dit"), fields


def bd3():
    """The record, model and config of fixtures/bd3_nelbo.npz."""
    path = FIXTURES / "bd3_nelbo.npz"
    record = Record.read(path)
    with np.load(path) as file:
        names = [name for name in file.files if name.startswith("weights.")]
        weights = {name.removeprefix("weights."): file[name] for name in names}
    for batch in record.batches:
        batch["valid"] = np.ones(batch["x"].shape, bool)
    published = published_names.load(weights, num_heads=2, mask_id=Text8.mask_id)
    return record, published, {"objective": "bd3", "alpha_0": 1.0, "block_length": 4}


def estimated(record: Record, published, fields: dict):
    """Our bound of a record's windows: (result, what `collecting` found)."""
    length, rows = record.windows.shape[1], max(len(batch["x"]) for batch in record.batches)
    fields = fields | {"data.seq_len": length, "eval.batch_size": rows, "mesh.devices": 1}
    config = config_lib.overridden(config_lib.default_config(), fields)
    mesh = sharding.make_mesh(config.mesh)
    apply = model_lib.bind(published.config, mesh)
    head = Head.of(published.config, published.mask_id, mesh)
    special = SpecialIds(published.mask_id, BOS)
    built = BuiltModel(mesh, published.config, apply, head, special)
    batches = []
    for batch in record.batches:
        x, valid = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
        x[: len(batch["x"])], valid[: len(batch["x"])] = batch["x"], batch["valid"]
        batches.append({"x": x, "valid": valid})
    is_ar = config.objective == "ar"
    noise = contextlib.nullcontext() if is_ar else recorded_noise([record], published.mask_id)
    with noise, collecting() as found:
        estimate = published_bound.make(config, built)
        return estimate(published.params, batches, split={}, seed=0), found


@pytest.mark.parametrize("run", RUNS)
def test_bound_is_that_of_the_published_code(run):
    record = record_of(run)
    check(record, *estimated(record, *golden_settings(run)))


def test_bound_of_bd3_is_that_of_its_published_code():
    """Its weight is 1 / t, and the first token of a window is not masked and not scored."""
    record, published, fields = bd3()
    check(record, *estimated(record, published, fields))


def check(record: Record, result, found: list):
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
    _, found = estimated(record, *golden_settings("mdlm"))
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


def test_noise_of_bd3_has_a_time_for_each_block_and_masks_by_it():
    """Times are stratified over the blocks of the batch; p(masked) = t, but for the first token."""
    masked, t_BL = published_nelbo.draw_bd3(prng.key(0), 500, (512, 8), 4)
    t_BN = np.asarray(t_BL)[:500].reshape(500, 2, 4)
    assert (t_BN == t_BN[..., :1]).all() and 1e-3 <= t_BN.min() and t_BN.max() <= 1
    strata = np.floor((t_BN[..., 0].ravel() - 1e-3) / (1 - 1e-3) * 1000 + 1e-3)
    assert np.abs(np.sort(strata) - np.arange(1000)).max() <= 1
    assert not np.asarray(masked)[:, 0].any()
    by_time = np.asarray(masked)[:500, 1:][t_BN.reshape(500, 8)[:, 1:] < 0.5]
    assert by_time.mean() == pytest.approx(0.25, abs=0.04)
