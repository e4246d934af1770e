"""Figures of a report: known calibration errors, and jackknife errors against the spread."""

import dataclasses

import numpy as np
import pytest

from esolm_jax.evaluation.likelihood import Estimate
from esolm_jax.evaluation.report import statistics
from esolm_jax.evaluation.report.window_sums import CELL, CONFIDENCE_BINS, WindowSums

BLOCKS, TOKENS = 30, 40  # predictions of a block


def estimate(nll=2.0, error=0.1, tokens=100):
    window_nll = np.full(4, nll * tokens / 4)
    return Estimate(nll, error, tokens, 3, window_nll, np.full(4, tokens // 4))


def sums_of(confidence, is_top, group, groups=("ar",)):
    """WindowSums of predictions [blocks, tokens], each with entropy 1 and NLL 1.5."""
    cells = np.zeros((len(confidence), len(groups), CONFIDENCE_BINS, len(CELL)))
    level = np.minimum((confidence * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    block = np.broadcast_to(np.arange(len(confidence))[:, None], confidence.shape)
    ones = np.ones_like(confidence)
    values = np.stack([ones, confidence, is_top, ones, 1.5 * ones], axis=-1)
    np.add.at(cells, (block, group, level), values)
    positions = np.stack([1.0 + block[:, :2], ones[:, :2]], axis=-1)
    return WindowSums(estimate(), 1, np.array([0, 1, 2]), positions, groups, cells)


def drawn(rng, probability, accuracy, blocks=BLOCKS):
    """A model that says `probability` and is right with probability `accuracy`."""
    shape = blocks, TOKENS
    confidence = rng.choice(probability, shape)
    right = np.interp(confidence, probability, accuracy)
    return sums_of(confidence, rng.random(shape) < right, np.zeros(shape, int))


def test_error_of_known_probabilities():
    """Of the parts with 0.3, 0.62 and 0.9 one is too high, one too low and one right."""
    found = drawn(np.random.default_rng(0), [0.3, 0.62, 0.9], [0.2, 0.82, 0.9], blocks=2000)
    (group,) = statistics.calibration([found])
    assert group["ece"] == pytest.approx((0.1 + 0.2 + 0.0) / 3, abs=0.005)
    assert group["accuracy"] == pytest.approx((0.2 + 0.82 + 0.9) / 3, abs=0.005)
    assert group["mean_confidence"] == pytest.approx((0.3 + 0.62 + 0.9) / 3, abs=0.005)
    assert (group["mean_entropy"], group["mean_nll"]) == pytest.approx((1, 1.5))
    assert group["nll_minus_entropy"] == pytest.approx(0.5)
    low, middle, high = group["bins"]
    assert (low["low"], low["high"]) == pytest.approx((4 / 15, 5 / 15))
    assert (middle["confidence"], high["confidence"]) == pytest.approx((0.62, 0.9))
    assert middle["accuracy"] == pytest.approx(0.82, abs=0.01)
    assert sum(b["count"] for b in group["bins"]) == group["predictions"] == 2000 * TOKENS


def test_printed_error_is_the_spread():
    found = [
        statistics.calibration([drawn(np.random.default_rng(i), [0.3, 0.62], [0.2, 0.8])])[0]
        for i in range(150)
    ]
    spread = np.std([group["ece"] for group in found], ddof=1)
    printed = np.mean([group["ece_standard_error"] for group in found])
    assert 0.8 < printed / spread < 1.25


def test_groups_and_all_of_them():
    rng, shape = np.random.default_rng(1), (BLOCKS, TOKENS)
    group = np.broadcast_to(np.arange(TOKENS) % 2, shape)
    confidence = np.where(group, 0.9, 0.1)
    found = sums_of(confidence, rng.random(shape) < 0.5, group, ("a", "b", "never"))
    whole, a, b = statistics.calibration([found])
    assert [one["group"] for one in (whole, a, b)] == ["all", "a", "b"]
    assert whole["predictions"] == a["predictions"] + b["predictions"] == BLOCKS * TOKENS
    assert whole["ece"] == pytest.approx((a["ece"] + b["ece"]) / 2)
    assert (a["mean_confidence"], b["mean_confidence"]) == pytest.approx((0.1, 0.9))


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(2).normal(size=50)
    blocks = np.stack([values, np.ones(50)], axis=1)
    mean, error = statistics.with_error(lambda sums: sums[:1] / sums[1:], [blocks])
    assert mean[0] == pytest.approx(values.mean())
    assert error[0] == pytest.approx(values.std(ddof=1) / np.sqrt(50))
    parts = [blocks[:20], blocks[20:]]
    mean, error = statistics.with_error(lambda sums: sums[:1] / sums[1:], parts)
    assert mean[0] == pytest.approx(values.mean())
    within = sum(len(part) * part[:, 0].var(ddof=1) for part in parts)
    assert error[0] == pytest.approx(np.sqrt(within) / 50, rel=0.05)


def test_one_block_has_no_error():
    found = drawn(np.random.default_rng(0), [0.3, 0.6], [0.3, 0.6], blocks=1)
    (group,) = statistics.calibration([found])
    assert np.isnan(group["ece_standard_error"]) and group["ece"] >= 0
    assert np.isnan(statistics.positions([found])[0]["standard_error"])


def test_positions_of_several_data_sets_are_sums():
    rng = np.random.default_rng(0)
    one, other = (drawn(rng, [0.3, 0.6], [0.3, 0.6], blocks=n) for n in (3, 5))
    rows = statistics.positions([one, other])
    assert [(row["first"], row["last"], row["tokens"]) for row in rows] == [(0, 0, 8), (1, 1, 8)]
    assert rows[0]["nats"] == 6 + 15
    assert rows[0]["nll_per_token"] == pytest.approx(21 / 8)


def test_merged_estimates():
    whole = statistics.merged([estimate(2.0, 0.1, 100), estimate(3.0, 0.2, 300)])
    assert whole.nll == pytest.approx((200 + 900) / 400)
    assert whole.standard_error == pytest.approx(np.hypot(10, 60) / 400)
    assert (whole.num_tokens, whole.error_samples, len(whole.window_nll)) == (400, 6, 8)
    alone = dataclasses.replace(estimate(), standard_error=np.nan)
    assert np.isnan(statistics.merged([alone, estimate()]).standard_error)
