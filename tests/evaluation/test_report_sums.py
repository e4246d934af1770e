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

LENGTH, WINDOWS, DRAWS, RARE, PLACE = 16, 15, 2, 3, 5
X = np.random.default_rng(0).choice((0, 2), (WINDOWS, LENGTH)).astype(np.int32)
X[:, PLACE] = RARE
VALID = np.arange(LENGTH)[None] < np.where(np.arange(WINDOWS) == 11, 7, LENGTH)[:, None]
BUILT, PARAMS = toy.lookup_model(LENGTH)
HEAD = PARAMS["logits"] = PARAMS["logits"] | {"bias": np.float32([0.0, 0.0, 0.3, -12.0])}
FAMILIES = [
    ("ar", 0.0),
    ("mdlm", 1.0),
    ("mdlm_shifted", 1.0),
    ("bd3", 1.0),
    ("eso_a", 0.5),
    ("eso_b", 0.5),
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
def made(objective, alpha_0):
    return window_sums.make(config(objective, alpha_0), BUILT)


@functools.cache
def sums(objective, alpha_0, size=5):
    collect = made(objective, alpha_0)
    return collect(PARAMS, batches(size), windows=WINDOWS, num_samples=DRAWS, seed=3)


@functools.cache
def predictions(objective, alpha_0):
    """(phase, row, weight, target, log p [V]) of every predicted token of all draws, from all
    logits, with the noise of window_noise."""
    found = []
    label = jax.jit(
        lambda *noise: window_noise.labelled_phases(config(objective, alpha_0), BUILT, *noise)
    )
    for key in jax.random.split(prng.key(3), DRAWS if alpha_0 else 1):
        phases = label(*window_noise.noise_of(key, 0, WINDOWS), X, VALID)
        for phase, labelled in enumerate(phases):
            target, weight = np.asarray(labelled.target), np.asarray(labelled.weight)
            predict = (0, target.shape[1])
            h = np.asarray(BUILT.apply(PARAMS, labelled.tokens, predict=predict, head=False))
            log_p = toy.log_probs(h @ np.asarray(HEAD["kernel"]) + np.asarray(HEAD["bias"]))
            for b, i in zip(*np.nonzero(weight), strict=True):
                found.append((phase, b, weight[b, i], target[b, i], log_p[b, i]))
    return found


@pytest.mark.parametrize("objective, alpha_0", FAMILIES)
def test_positions_add_up_to_the_bound(objective, alpha_0):
    found = sums(objective, alpha_0)
    wanted = np.zeros(WINDOWS)
    for _, b, weight, target, log_p in predictions(objective, alpha_0):
        wanted[b] -= weight * log_p[target] / found.draws
    rows = statistics.positions([found])
    assert sum(row["nats"] for row in rows) == pytest.approx(wanted.sum(), rel=1e-5)
    assert [row["tokens"] for row in rows] == VALID.sum(axis=0).tolist()
    estimate = found.estimate
    total = estimate.nll * estimate.num_tokens
    assert sum(row["nats"] for row in rows) == pytest.approx(total, rel=1e-12)
    np.testing.assert_allclose(estimate.window_nll, wanted, rtol=2e-5)


def test_estimate_is_that_of_window_noise():
    bound = window_noise.make_nelbo(config("bd3", 1.0), BUILT)
    wanted = bound(PARAMS, batches(5), num_samples=DRAWS, seed=3)
    found = sums("bd3", 1.0).estimate
    np.testing.assert_allclose(found.window_nll, wanted.window_nll, rtol=1e-6)
    assert found.standard_error == pytest.approx(wanted.standard_error, rel=1e-5)
    assert found.error_samples == wanted.error_samples


@pytest.mark.parametrize("objective, alpha_0", FAMILIES)
def test_terms_are_at_the_position_of_the_predicted_token(objective, alpha_0):
    """The same token is improbable, and always at one position."""
    nll = [row["nll_per_token"] for row in statistics.positions([sums(objective, alpha_0)])]
    assert int(np.argmax(nll)) == PLACE
    assert nll[PLACE] > 4 * max(nll[:PLACE] + nll[PLACE + 1 :])
    assert (nll[0] == 0) == (objective == "mdlm_shifted")  # which is given the first token


@pytest.mark.parametrize("objective, alpha_0", FAMILIES)
def test_cells_are_those_of_plain_loops(objective, alpha_0):
    found = sums(objective, alpha_0).cells.sum(axis=0)
    wanted = np.zeros_like(found)
    for phase, _, weight, target, log_p in predictions(objective, alpha_0):
        p, group = np.exp(log_p), 0
        if alpha_0:  # weight = α₀ (1 − ε) / (1 − α_t) in the diffusion phase
            known = 1 - alpha_0 * (1 - noise.EPS) / weight
            group = 4 if phase else min(int(4 * known / alpha_0), 3)
        entropy = -sum(q * math.log(q) for q in p if q > 0)
        values = 1, p.max(), p.argmax() == target, entropy, -log_p[target]
        wanted[group, min(int(p.max() * 15), 14)] += np.array(values, float)
    np.testing.assert_array_equal(found[..., 0], wanted[..., 0])
    np.testing.assert_allclose(found, wanted, rtol=3e-5, atol=1e-5)
    assert found[..., 0].sum() > 100


def test_groups_are_noise_levels_and_the_sequential_phase():
    assert sums("eso_b", 0.5).groups == (
        "diffusion, α_t 0 to 0.125",
        "diffusion, α_t 0.125 to 0.25",
        "diffusion, α_t 0.25 to 0.375",
        "diffusion, α_t 0.375 to 0.5",
        "sequential",
    )
    assert sums("ar", 0.0).groups == ("ar",)


def test_batch_size_changes_nothing():
    one, other = sums("bd3", 1.0, 1), sums("bd3", 1.0, 5)
    np.testing.assert_array_equal(one.cells[..., 0], other.cells[..., 0])
    np.testing.assert_allclose(one.cells, other.cells, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(one.positions, other.positions, rtol=1e-6, atol=1e-6)
    assert one.estimate.nll == pytest.approx(other.estimate.nll, rel=1e-6)


def test_blocks_are_of_consecutive_windows(monkeypatch):
    many = sums("ar", 0.0).positions
    assert len(many) == WINDOWS
    monkeypatch.setattr(window_sums, "BLOCKS", 4)
    few = made("ar", 0.0)(PARAMS, batches(5), windows=WINDOWS, num_samples=1, seed=3)
    block = np.arange(WINDOWS) * 4 // WINDOWS
    for i, positions in enumerate(few.positions):
        np.testing.assert_allclose(positions, many[block == i].sum(axis=0), rtol=1e-6)


def test_bins_of_positions_cover_them_once():
    bin_of, edges = window_sums.position_bins(37)
    assert len(edges) == window_sums.POSITION_BINS + 1
    assert (edges[0], edges[-1]) == (0, 37) and (np.diff(edges) > 0).all()
    for i in range(window_sums.POSITION_BINS):
        assert (bin_of[edges[i] : edges[i + 1]] == i).all()
    np.testing.assert_array_equal(window_sums.position_bins(3)[0], [0, 1, 2])
