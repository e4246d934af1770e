"""Bounds with noise of the windows: unbiased, honest errors, independent of the batch size."""

import functools
import math

import jax
import numpy as np
import pytest
import toy

from benchmarks import estimators
from esolm_jax.evaluation import likelihood, published_bound, window_noise
from esolm_jax.evaluation.protocol.published_nelbo import BatchNelbo

pytestmark = pytest.mark.fast_compile
LENGTH, WINDOWS, SEEDS = 16, 40, 30  # windows: one whole group and a part of another
SHARP = toy.PARAMS | {"logits": jax.tree.map(lambda a: 4 * a, toy.PARAMS["logits"])}
X = np.random.default_rng(0).choice(toy.REAL, (WINDOWS, LENGTH)).astype(np.int32)
VALID = np.arange(LENGTH)[None] < np.where(np.arange(WINDOWS) == 35, 7, LENGTH)[:, None]
CASES = [("eso_b", 0.5), ("bd3", 1.0)]


def batches(size, valid=VALID):
    for start in range(0, WINDOWS, size):
        x, there = np.zeros((size, LENGTH), np.int32), np.zeros((size, LENGTH), bool)
        count = len(X[start : start + size])
        x[:count], there[:count] = X[start : start + size], valid[start : start + size]
        yield {"x": x, "valid": there}


@functools.cache
def made(objective, alpha_0, bound="nelbo"):
    """estimate(size of batches, draws, seed); compiled once."""
    make = getattr(window_noise, f"make_{bound}")
    run = make(toy.config(objective, alpha_0, LENGTH), toy.BUILT)
    draws = {"nelbo": "num_samples", "importance_weighted": "num_orders"}[bound]
    return lambda size, count, seed: run(SHARP, batches(size), seed=seed, **{draws: count})


@functools.cache
def over_seeds(objective, alpha_0, bound, count):
    return [made(objective, alpha_0, bound)(WINDOWS, count, seed) for seed in range(SEEDS)]


def test_error_is_the_spread_over_seeds():
    found = estimators.summary(over_seeds("eso_b", 0.5, "nelbo", 4))
    assert 0.6 < found["printed_over_spread"] < 1.6
    assert found["within_two_errors"] > 0.75


def test_error_of_the_importance_weighted_bound():
    found = estimators.summary(over_seeds("eso_b", 0.5, "importance_weighted", 3))
    assert 0.6 < found["printed_over_spread"] < 1.6


@pytest.mark.parametrize("objective, alpha_0", CASES)
def test_expectation_is_that_of_likelihood(objective, alpha_0):
    ours = [e.nll for e in over_seeds(objective, alpha_0, "nelbo", 4)]
    config = toy.config(objective, alpha_0, LENGTH)
    other = likelihood.make_nelbo(config, toy.BUILT)(
        SHARP, batches(WINDOWS), num_samples=4 * SEEDS, seed=1
    )
    error = math.hypot(np.std(ours, ddof=1) / math.sqrt(SEEDS), other.standard_error)
    assert abs(np.mean(ours) - other.nll) < 4 * error


@pytest.mark.parametrize("bound", ["nelbo", "importance_weighted"])
def test_batch_size_changes_nothing(bound):
    found = [made("eso_b", 0.5, bound)(size, 3, 1) for size in (WINDOWS, 3)]
    np.testing.assert_allclose(found[1].window_nll, found[0].window_nll, rtol=2e-6)
    np.testing.assert_array_equal(found[1].window_tokens, VALID.sum(axis=1))
    assert found[1].nll == pytest.approx(found[0].nll, rel=1e-6)
    assert found[1].standard_error == pytest.approx(found[0].standard_error, rel=1e-4)


def test_times_of_a_group_cover_all_strata():
    offsets = jax.vmap(functools.partial(window_noise.time_offset, jax.random.key(5)))(
        np.arange(3 * window_noise.GROUP)
    )
    for group in np.asarray(offsets).reshape(3, -1):
        strata = np.sort(np.floor(group * window_noise.GROUP).astype(int))
        assert strata.tolist() == list(range(window_noise.GROUP))


def test_no_error_of_one_draw():
    estimate = made("eso_b", 0.5)(WINDOWS, 1, 0)
    assert math.isnan(estimate.standard_error) and estimate.error_samples == 0


# The published protocol

WHOLE = np.ones_like(VALID)


@functools.cache
def make_published(objective, alpha_0):
    return published_bound.make(toy.config(objective, alpha_0, LENGTH), toy.BUILT)


def published(objective, alpha_0, size, seeds):
    run = make_published(objective, alpha_0)
    return [run(SHARP, batches(size, WHOLE), split={}, seed=seed).figures for seed in range(seeds)]


def test_published_protocol_has_the_same_expectation():
    """For batches of equal size without padding: of the window halves that feed each term."""
    found = [figures["nll_per_token"] for figures in published("eso_b", 0.5, 8, SEEDS)]
    expected, error = _of_halves(toy.config("eso_b", 0.5, LENGTH))
    error = math.hypot(np.std(found, ddof=1) / math.sqrt(SEEDS), error)
    assert abs(np.mean(found) - expected) < 4 * error


def _of_halves(config, draws=100):
    """Diffusion term of the first half of each batch of 8 plus sequential term of the second, and
    the standard error."""
    phases = likelihood.make_phases(config, toy.BUILT.special, low_variance=False)
    first, terms = np.arange(WINDOWS) % 8 < 4, []
    for i, (phase, rows) in enumerate(zip(phases, (first, ~first), strict=True)):
        nelbo = functools.partial(likelihood.nelbo, toy.BUILT.apply, [phase], toy.BUILT.head)
        draw, keys = jax.jit(nelbo), jax.random.split(jax.random.key(i), draws)
        sums = [np.asarray(draw(SHARP, key, X[rows], WHOLE[rows])).sum() for key in keys]
        terms.append(np.array(sums) / (rows.sum() * LENGTH))
    error = math.hypot(*(term.std(ddof=1) / math.sqrt(draws) for term in terms))
    return sum(term.mean() for term in terms), error


def test_a_short_last_batch_is_weighted_as_published():
    """37 windows: the last batch has 5 rows, of which ⌊κ · 5⌋ = 2 feed the diffusion term."""
    run = make_published("eso_b", 0.5)
    valid = WHOLE & (np.arange(WINDOWS) < 37)[:, None]
    figures = run(SHARP, batches(8, valid), split={}, seed=0).figures
    assert figures["num_tokens"] == 37 * LENGTH and figures["windows"] == 37
    assert figures["kappa"] == 0.5 and figures["standard_error"] > 0


@pytest.mark.parametrize("rows", [[32, 32, 32], [32, 32, 32, 2], [32, 2], [5, 9, 16, 40]])
def test_published_error_is_unbiased_for_batches_of_unequal_size(rows):
    """Its mean square over 4000 splits is the variance of the mean; both terms have noise."""
    rng, values, squares = np.random.default_rng(0), [], []
    for _ in range(4000):
        batches = [_random_batch(rng, count) for count in rows]
        nll = sum(batch.nll for batch in batches) / sum(batch.num_tokens for batch in batches)
        values.append(nll)
        squares.append(published_bound.error_over_batches(batches, nll) ** 2)
    assert 0.9 < np.mean(squares) / np.var(values) < 1.1


def _random_batch(rng, rows):
    """A batch of windows of 10 tokens, the second half (or more) of them sequential."""
    first = rows // 2
    nll = rng.normal(40, 5, rows)
    tokens = 10 * first, 10 * (rows - first)
    return BatchNelbo(nll[:first].sum(), tokens[0], nll[first:].sum(), tokens[1])
