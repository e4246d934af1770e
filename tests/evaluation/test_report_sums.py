"""The sums of a report: positions add up to the bound, cells are those of plain loops."""

import functools
import math

import jax
import numpy as np
import pytest
import toy

from esolm_jax.evaluation import window_noise
from esolm_jax.evaluation.report import statistics, window_sums
from esolm_jax.family import noise
from esolm_jax.process import prng

pytestmark = pytest.mark.fast_compile
LENGTH, WINDOWS, DRAWS, RARE, PLACE = 16, 15, 2, 3, 5
X = np.random.default_rng(0).choice((0, 2), (WINDOWS, LENGTH)).astype(np.int32)
X[:, PLACE] = RARE
VALID = np.arange(LENGTH)[None] < np.where(np.arange(WINDOWS) == 11, 7, LENGTH)[:, None]
HEAD = toy.PARAMS["logits"]
PARAMS = toy.PARAMS | {"logits": HEAD | {"bias": HEAD["bias"].at[RARE].add(-12.0)}}
FAMILIES = [
    ("ar", 0.0),
    ("mdlm", 1.0),
    ("mdlm_shifted", 1.0),
    ("bd3", 1.0),
    ("eso_a", 0.5),
    ("eso_b", 0.5),
    ("eso_b", 0.0),
]


def batches(size):
    for start in range(0, WINDOWS, size):
        x, valid = np.zeros((size, LENGTH), np.int32), np.zeros((size, LENGTH), bool)
        count = len(X[start : start + size])
        x[:count], valid[:count] = X[start : start + size], VALID[start : start + size]
        yield {"x": x, "valid": valid}


def config(objective, alpha_0):
    return toy.config(objective, alpha_0, LENGTH, block_length=4)


@functools.cache
def sums(objective, alpha_0, size=WINDOWS):
    collect = window_sums.make(config(objective, alpha_0), toy.BUILT)
    return collect(PARAMS, batches(size), windows=WINDOWS, num_samples=DRAWS, seed=3)


@pytest.mark.parametrize("objective, alpha_0", FAMILIES)
def test_positions_add_up_to_the_bound(objective, alpha_0):
    found = sums(objective, alpha_0)
    bound = window_noise.make_nelbo(config(objective, alpha_0), toy.BUILT)
    wanted = bound(PARAMS, batches(WINDOWS), num_samples=DRAWS, seed=3)
    rows = statistics.positions([found])
    assert sum(row["nats"] for row in rows) == pytest.approx(wanted.nll * VALID.sum(), rel=1e-6)
    assert [row["tokens"] for row in rows] == VALID.sum(axis=0).tolist()
    assert found.estimate.nll == pytest.approx(wanted.nll, rel=1e-6)
    np.testing.assert_allclose(found.estimate.window_nll, wanted.window_nll, rtol=1e-6)
    assert found.estimate.standard_error == pytest.approx(wanted.standard_error, rel=1e-5)
    assert found.estimate.error_samples == wanted.error_samples


@pytest.mark.parametrize("objective, alpha_0", FAMILIES)
def test_terms_are_at_the_position_of_the_predicted_token(objective, alpha_0):
    """The same token is improbable, and always at one position."""
    nll = [row["nll_per_token"] for row in statistics.positions([sums(objective, alpha_0)])]
    assert int(np.argmax(nll)) == PLACE
    assert nll[PLACE] > 4 * max(nll[:PLACE] + nll[PLACE + 1 :])
    assert (nll[0] == 0) == (objective == "mdlm_shifted")  # which is given the first token


def test_positions_of_ar_are_its_conditionals():
    rows = statistics.positions([sums("ar", 0.0)])
    table = [
        toy.step("ar", x.tolist(), tuple(range(LENGTH)), i, 1)
        for x, valid in zip(X, VALID, strict=True)
        for i in range(valid.sum())
    ]
    target = X[VALID]
    logits = toy.logits_at_end(table, width=LENGTH)[:, -1] + np.float32(PARAMS["logits"]["bias"])
    log_p = toy.log_probs(logits - np.float32(HEAD["bias"]))[np.arange(len(target)), target]
    place = np.nonzero(VALID)[1]
    wanted = [-log_p[place == i].mean() for i in range(LENGTH)]
    np.testing.assert_allclose([row["nll_per_token"] for row in rows], wanted, rtol=2e-5)


@pytest.mark.parametrize("objective, alpha_0", [("ar", 0.0), ("bd3", 1.0), ("eso_b", 0.5)])
def test_cells_are_those_of_plain_loops(objective, alpha_0):
    """All logits, one token after the other."""
    found = sums(objective, alpha_0)
    wanted = np.zeros(found.cells.shape[1:])
    draws = 1 if alpha_0 == 0 else DRAWS
    for key in jax.random.split(prng.key(3), draws):
        drawn = window_noise.noise_of(key, 0, WINDOWS)
        phases = window_noise.labelled_phases(
            config(objective, alpha_0), toy.BUILT, *drawn, X, VALID
        )
        for i, labelled in enumerate(phases):
            logits = toy.apply(PARAMS, labelled.tokens)[:, : labelled.target.shape[1]]
            add_up(wanted, toy.log_probs(logits), labelled, alpha_0, is_second=i == 1)
    np.testing.assert_array_equal(found.cells.sum(axis=0)[..., 0], wanted[..., 0])
    np.testing.assert_allclose(found.cells.sum(axis=0), wanted, rtol=3e-5, atol=1e-5)
    assert found.cells[..., 0].sum() > 100


def add_up(cells, log_p, labelled, alpha_0, is_second):
    """Adds the predictions of a phase to [groups, bins, 5]."""
    target, weight = np.asarray(labelled.target), np.asarray(labelled.weight)
    for b, i in zip(*np.nonzero(weight), strict=True):
        p = np.exp(log_p[b, i])
        group = 0
        if alpha_0:  # weight = α₀ (1 − ε) / (1 − α_t) in the diffusion phase
            known = 1 - alpha_0 * (1 - noise.EPS) / weight[b, i]
            group = 4 if is_second else min(int(4 * known / alpha_0), 3)
        entropy = -sum(q * math.log(q) for q in p if q > 0)
        nll = -log_p[b, i, target[b, i]]
        values = 1, p.max(), p.argmax() == target[b, i], entropy, nll
        cells[group, min(int(p.max() * 15), 14)] += np.array(values, float)


def test_groups_are_noise_levels_and_the_sequential_phase():
    assert sums("eso_b", 0.5).groups == (
        "diffusion, α_t 0 to 0.125",
        "diffusion, α_t 0.125 to 0.25",
        "diffusion, α_t 0.25 to 0.375",
        "diffusion, α_t 0.375 to 0.5",
        "sequential",
    )
    assert sums("ar", 0.0).groups == ("ar",)


@pytest.mark.parametrize("size", [1, 5])
def test_batch_size_changes_nothing(size):
    one, other = sums("eso_b", 0.5), sums("eso_b", 0.5, size)
    np.testing.assert_array_equal(one.cells[..., 0], other.cells[..., 0])
    np.testing.assert_allclose(one.cells, other.cells, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(one.positions, other.positions, rtol=1e-6, atol=1e-6)
    assert one.estimate.nll == pytest.approx(other.estimate.nll, rel=1e-6)


def test_blocks_are_of_consecutive_windows(monkeypatch):
    monkeypatch.setattr(window_sums, "BLOCKS", 4)
    few = window_sums.make(config("ar", 0.0), toy.BUILT)(
        PARAMS, batches(5), windows=WINDOWS, num_samples=1, seed=3
    )
    block = np.arange(WINDOWS) * 4 // WINDOWS
    many = sums("ar", 0.0).positions
    assert len(many) == WINDOWS
    for i, positions in enumerate(few.positions):
        np.testing.assert_allclose(positions, many[block == i].sum(axis=0), rtol=1e-6)


def test_bins_of_positions_cover_them_once():
    bin_of, edges = window_sums.position_bins(37)
    assert len(edges) == window_sums.POSITION_BINS + 1
    assert (edges[0], edges[-1]) == (0, 37) and (np.diff(edges) > 0).all()
    for i in range(window_sums.POSITION_BINS):
        assert (bin_of[edges[i] : edges[i + 1]] == i).all()
    np.testing.assert_array_equal(window_sums.position_bins(3)[0], [0, 1, 2])
