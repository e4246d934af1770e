"""Printed standard errors are the spread over seeds: of every bound, for heavy tails too."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import toy

from benchmarks import estimators, estimators_suite
from esolm_jax.evaluation import likelihood

pytestmark = pytest.mark.fast_compile  # as for users: test_protocol_nelbo.py

LENGTH, WINDOWS, BATCH, SEEDS = 32, 16, 4, 40
# Logits so far apart that log p of a text varies by 5 to 10 nats over orders.
SHARP = toy.PARAMS | {"logits": jax.tree.map(lambda a: 10 * a, toy.PARAMS["logits"])}
X = np.random.default_rng(0).choice(toy.REAL, (WINDOWS, LENGTH)).astype(np.int32)
VALID = np.arange(LENGTH)[None] < np.where(np.arange(WINDOWS) == 5, 7, LENGTH)[:, None]


def batches():
    for i in range(0, WINDOWS, BATCH):
        yield {"x": X[i : i + BATCH], "valid": VALID[i : i + BATCH]}


@functools.cache
def over_seeds(objective, alpha_0, bound, count):
    config = toy.config(objective, alpha_0, LENGTH)
    make = {"nelbo": likelihood.make_nelbo, "orders": likelihood.make_importance_weighted}[bound]
    estimate = make(config, toy.BUILT)
    settings = {"nelbo": {"num_samples": count}, "orders": {"num_orders": count}}[bound]
    return [estimate(SHARP, batches(), seed=seed, **settings) for seed in range(SEEDS)]


@pytest.mark.parametrize(
    ("objective", "alpha_0", "bound", "count"),
    [
        ("eso_b", 0.5, "orders", 2),
        ("eso_b", 0.5, "orders", 8),
        ("eso_b", 1.0, "orders", 24),
        ("eso_b", 1.0, "nelbo", 2),
        ("eso_b", 0.5, "nelbo", 2),
        ("eso_b", 0.125, "nelbo", 2),
        ("eso_b", 0.5, "nelbo", 8),
        ("eso_a", 0.5, "nelbo", 2),
        ("mdlm", 1.0, "nelbo", 2),
        ("bd3", 1.0, "nelbo", 2),
    ],
)
def test_printed_error_is_the_spread_over_seeds(objective, alpha_0, bound, count):
    found = estimators.summary(over_seeds(objective, alpha_0, bound, count))
    assert 0.6 < found["printed_over_spread"] < 1.6
    assert found["within_two_errors"] > 0.75


@pytest.mark.parametrize("bound", ["nelbo", "orders"])
def test_no_error_is_printed_of_one_draw(bound):
    found = over_seeds("eso_b", 0.5, bound, 1)
    assert np.isnan([e.standard_error for e in found]).all()
    assert found[0].error_samples == 0
    assert estimators.summary(found)["printed_over_spread"] is None


def test_orders_of_the_sharp_model_have_heavy_tails():
    """Else the delta method would do, and the tests above could not tell."""
    estimate = over_seeds("eso_b", 0.5, "orders", 1)
    windows = np.array([e.window_nll for e in estimate])
    assert 3 < np.median(windows.std(axis=0)) < 20


@pytest.mark.parametrize("deviation", [0.7, 3.0, 8.0])
@pytest.mark.parametrize("orders", [2, 4, 16, 64])
def test_error_of_log_mean_exp_with_heavy_tails(deviation, orders):
    """The delta method's is at most 1 nat²: 2 to 6 times too small at 8 nats."""
    log_p = np.random.default_rng(1).normal(-300, deviation, (4000, orders))
    log_mean, variance = likelihood.log_mean_exp(log_p)
    assert 0.95 < np.sqrt(variance.mean()) / log_mean.std() < 1.5


def test_jackknife_leaves_out_one_order_at_a_time():
    log_p = np.random.default_rng(2).normal(-2000, 5, (20, 6))
    log_p[3] = -1500.0, *[-2000.0] * 5  # one order carries everything
    log_p[4] = -1500.0
    _, variance = likelihood.log_mean_exp(log_p)
    left_out = [np.logaddexp.reduce(np.delete(log_p, k, axis=1), axis=1) for k in range(6)]
    np.testing.assert_allclose(variance, 6 * np.var(left_out, axis=0), rtol=1e-9, atol=1e-20)


def test_error_of_a_part_is_the_spread_over_parts():
    (whole, *_) = over_seeds("eso_b", 0.5, "nelbo", 8)
    assert len(whole.window_nll) == len(whole.window_tokens) == WINDOWS
    assert whole.window_tokens.sum() == whole.num_tokens == VALID.sum()
    assert whole.window_nll.sum() / whole.num_tokens == pytest.approx(whole.nll)
    nll, tokens = (np.tile(a, 8) for a in (whole.window_nll, whole.window_tokens))
    many = dataclasses.replace(whole, window_nll=nll, window_tokens=tokens)
    found = estimators.parts_of_a_split(many, 32, 200)
    assert 0.8 < found["printed_over_spread"] < 1.25
    # A part that is the whole has the Monte-Carlo error alone.
    assert whole.error_for(WINDOWS) == pytest.approx(whole.standard_error)
    assert whole.error_for(10 * WINDOWS) > whole.error_for(2 * WINDOWS) > whole.standard_error


def test_the_ratio_of_error_and_spread_has_its_own_error():
    """Of 50 normal values whose error is known, about 1/√(2 · 49)."""
    draws, seeds = np.random.default_rng(0).normal(5, 0.2, (200, 50)), np.arange(200)
    rows = [
        estimators_suite.compare([{"nll_per_token": x, "standard_error": 0.2} for x in draws[i]])
        for i in seeds
    ]
    ratio = np.array([row["printed_over_spread"] for row in rows])
    error = np.array([row["ratio_error"] for row in rows])
    assert 0.09 < error.mean() < 0.115 and 0.8 < error.mean() / ratio.std() < 1.2
    assert 0.9 < np.mean(abs(ratio - 1) < 2 * error) <= 1
