"""What the phases draw (masks, times, weights, orders) and hand to the loss, padding included."""

import functools

import jax
import numpy as np
import pytest
import toy
from compilation import compiling

from esolm_jax.family import eso_b, noise
from esolm_jax.family.phase import make_phases

pytestmark = pytest.mark.fast_compile  # as for users: test_golden_training.py

KEY = jax.random.key(0)
BATCH = 256
LENGTH = 12
BLOCK = 4

# objective, α₀ and the phase, for all there are
PHASES = [
    ("ar", 0.0, "ar"),
    ("mdlm", 1.0, "diffusion"),
    ("bd3", 1.0, "diffusion"),
    ("eso_a", 0.5, "diffusion"),
    ("eso_a", 0.5, "sequential"),
    ("eso_b", 1.0, "diffusion"),
    ("eso_b", 0.5, "diffusion"),
    ("eso_b", 0.5, "sequential"),
    ("eso_b", 0.0, "sequential"),
]
DIFFUSION = [case for case in PHASES if case[2] == "diffusion"]
SEQUENTIAL = [case for case in PHASES if case[2] == "sequential"]


def phases(objective, alpha_0, low_variance=False):
    config = toy.config(objective, alpha_0, LENGTH, BLOCK)
    config.kappa = 0.25
    return make_phases(config, toy.SPECIAL, low_variance=low_variance)


@functools.cache
def data(batch=BATCH):
    """x and valid; half of the rows have padding, of any length."""
    rng = np.random.default_rng(0)
    x = rng.choice(toy.REAL, (batch, LENGTH)).astype(np.int32)
    real = np.where(np.arange(batch) % 2, rng.integers(1, LENGTH, batch), LENGTH)
    return x, np.arange(LENGTH) < real[:, None]


@functools.cache
def drawing(objective, alpha_0, name, low_variance=False):
    """The phase's label function as training runs it: one program."""
    found = {phase.name: phase for phase in phases(objective, alpha_0, low_variance)}
    return jax.jit(found[name].label)


@functools.cache
def label(objective, alpha_0, name, low_variance=False, padded=True):
    """x and valid, and numpy versions of what the phase returns for them."""
    x, valid = data()
    if not padded:
        valid = np.ones_like(valid)
    draw = drawing(objective, alpha_0, name, low_variance)
    return x, valid, jax.tree.map(np.asarray, draw(KEY, x, valid))


def in_text_order(labelled, values):
    """[B, L] values by index → by position."""
    text = np.zeros_like(values)
    np.put_along_axis(text, labelled.tokens.position[:, :LENGTH], values, axis=1)
    return text


def masked_in_text_order(labelled):
    return in_text_order(labelled, labelled.tokens.token[:, :LENGTH] == toy.MASK)


@pytest.mark.parametrize(
    ("objective", "alpha_0", "want"),
    [
        ("ar", 0.0, {"ar": 1}),
        ("mdlm", 1.0, {"diffusion": 1}),
        ("bd3", 1.0, {"diffusion": 1}),
        ("eso_a", 0.0, {"sequential": 1}),
        ("eso_a", 0.5, {"diffusion": 0.25, "sequential": 0.75}),
        ("eso_a", 1.0, {"diffusion": 1}),
        ("eso_b", 0.0, {"sequential": 1}),
        ("eso_b", 0.125, {"diffusion": 0.25, "sequential": 0.75}),
        ("eso_b", 1.0, {"diffusion": 1}),
        ("eso_b", 0, {"sequential": 1}),
        ("eso_b", 1, {"diffusion": 1}),
    ],
)
def test_alpha_0_says_which_phases_there_are_and_kappa_their_shares(objective, alpha_0, want):
    assert {phase.name: phase.fraction for phase in phases(objective, alpha_0)} == want


@pytest.mark.parametrize("case", PHASES, ids=str)
def test_targets_are_the_text_and_padding_counts_for_nothing(case):
    x, valid, labelled = label(*case)
    position = labelled.tokens.position[:, :LENGTH]
    np.testing.assert_array_equal(np.sort(position, axis=1), np.tile(np.arange(LENGTH), (BATCH, 1)))
    np.testing.assert_array_equal(labelled.target, np.take_along_axis(x, position, axis=1))
    np.testing.assert_array_equal(labelled.num_tokens, valid.sum(axis=1))
    assert labelled.weight.shape == labelled.target.shape
    assert labelled.weight.dtype == np.float32
    assert (in_text_order(labelled, labelled.weight)[~valid] == 0).all()


@pytest.mark.parametrize("case", PHASES, ids=str)
def test_a_token_is_a_mask_or_that_of_the_text_and_streams_lie_alike(case):
    x, valid, labelled = label(*case)
    tokens = labelled.tokens
    text = np.take_along_axis(x, tokens.position[:, :LENGTH], axis=1)
    if case[0] == "ar":
        text = np.concatenate([np.full((BATCH, 1), toy.START), x[:, :-1]], axis=1)
    known = tokens.token[:, :LENGTH] != toy.MASK
    np.testing.assert_array_equal(tokens.token[:, :LENGTH][known], text[known])
    two_streams = case[0] == "bd3" or case[2] == "sequential"
    assert tokens.token.shape[1] == LENGTH * (2 if two_streams else 1)
    assert (tokens.in_context[:, :LENGTH] == (not two_streams)).all()
    if two_streams:
        assert tokens.in_context[:, LENGTH:].all()
        np.testing.assert_array_equal(tokens.token[:, LENGTH:], text)
        np.testing.assert_array_equal(tokens.position[:, LENGTH:], tokens.position[:, :LENGTH])


def times(labelled, alpha_0):
    """Times [B, L] by position, from the weights; NaN where nothing is masked."""
    weight = in_text_order(labelled, labelled.weight).astype(np.float64)
    with np.errstate(divide="ignore"):
        alpha = 1 - alpha_0 * (1 - noise.EPS) / weight
    return np.where(weight > 0, (1 - alpha / alpha_0) / (1 - noise.EPS), np.nan)


@pytest.mark.parametrize("case", DIFFUSION, ids=str)
def test_diffusion_times_cover_the_strata_of_the_batch_one_each(case):
    """The time of a row (of a block, in bd3) is read off its ELBO weight, so this also shows that
    all masked tokens of a row (of a block) have the same weight, −α'_t/(1−α_t)."""
    _, _, labelled = label(*case, padded=False)
    t = times(labelled, case[1])
    per_row = LENGTH // BLOCK if case[0] == "bd3" else 1
    t = t.reshape(BATCH * per_row, -1)
    seen = ~np.isnan(t).all(axis=1)
    t = t[seen]
    np.testing.assert_allclose(np.nanmin(t, axis=1), np.nanmax(t, axis=1), rtol=1e-4, atol=0)
    count = BATCH * per_row
    scaled = (np.nanmean(t, axis=1) - noise.EPS) / (1 - noise.EPS) * count  # u + i
    assert seen.mean() > 0.6
    stratum, u = np.divmod(scaled, 1)
    assert len(set(stratum)) == len(stratum)  # no stratum twice
    assert list(stratum) != sorted(stratum)  # dealt out in random order
    u = (u - u[0] + 0.5) % 1 - 0.5  # the same in all strata
    np.testing.assert_allclose(u, 0, atol=0.05)


def test_times_lie_between_eps_and_one_and_differ_from_key_to_key():
    t = np.stack([noise.stratified_times(jax.random.key(i), (4, 5)) for i in range(200)])
    assert t.shape == (200, 4, 5)
    assert t.min() >= noise.EPS
    assert t.max() <= 1
    order = np.argsort(t.reshape(200, 20), axis=1)
    assert len(np.unique(order[:, 0])) == 20  # every place gets every stratum
    strata = (np.sort(t.reshape(200, 20), axis=1) - noise.EPS) / (1 - noise.EPS) * 20 - np.arange(
        20
    )
    assert strata.min() > -1e-4
    assert strata.max() < 1 + 1e-4
    assert abs(strata[:, 0].mean() - 0.5) < 5 * np.sqrt(1 / 12 / 200)


@pytest.mark.parametrize("case", DIFFUSION, ids=str)
def test_diffusion_masks_have_probability_one_minus_alpha_t(case):
    _, _, labelled = label(*case, padded=False)
    masked = masked_in_text_order(labelled)
    if case[0] == "bd3":
        masked = masked.reshape(-1, BLOCK)
    count = len(masked)
    t = noise.EPS + (1 - noise.EPS) * (np.arange(count) + 0.5) / count  # up to the batch's u
    probability = 1 - np.asarray(noise.alpha(t, case[1]))
    error = np.sqrt(np.mean(probability * (1 - probability)) / masked.size)
    gap = masked.mean(axis=0) - probability.mean()  # at every position
    assert (abs(gap) < 4.5 * error * np.sqrt(masked.shape[1]) + 1 / count).all()
    # The late quarter, by the times in the weights: rows there have a mask, but for very few.
    drawn = np.nanmax(times(labelled, case[1]).reshape(masked.shape), axis=1, initial=0)
    late = masked[drawn > 0.75]
    assert abs(len(late) - count / 4) < 0.02 * count + 1
    assert abs(late.mean() - probability[-count // 4 :].mean()) < 8 * error + 0.01


@pytest.mark.parametrize("case", SEQUENTIAL, ids=str)
def test_sequential_masks_have_probability_one_minus_alpha_0_and_weight_one(case):
    _, valid, labelled = label(*case)
    masked = masked_in_text_order(labelled)
    p = 1 - case[1]
    assert abs(masked[valid].mean() - p) <= 4 * np.sqrt(p * (1 - p) / valid.sum())
    assert not masked[~valid].any()
    np.testing.assert_array_equal(in_text_order(labelled, labelled.weight), masked)


@pytest.mark.parametrize("case", DIFFUSION, ids=str)
def test_diffusion_weight_is_on_masked_real_tokens_and_low_variance_drops_it(case):
    _, valid, labelled = label(*case)
    masked = masked_in_text_order(labelled)
    assert not masked[~valid].any()
    weight = in_text_order(labelled, labelled.weight)
    np.testing.assert_array_equal(weight > 0, masked)
    if case[1] == 1:
        _, _, low_variance = label(*case, low_variance=True)
        np.testing.assert_array_equal(in_text_order(low_variance, low_variance.weight), masked)


def test_ar_predicts_every_real_token_with_weight_one():
    _, valid, labelled = label("ar", 0.0, "ar")
    np.testing.assert_array_equal(labelled.weight, valid)


def test_elbo_weight_is_minus_the_slope_over_the_masked_fraction():
    t, step = np.linspace(0.1, 0.9, 9), 1e-4
    for alpha_0 in (0.125, 0.5, 1.0):
        slope = (noise.alpha(t + step, alpha_0) - noise.alpha(t - step, alpha_0)) / (2 * step)
        want = -slope / (1 - alpha_0 * (1 - 0.999 * t))
        np.testing.assert_allclose(noise.elbo_weight(t, alpha_0), want, rtol=1e-6)


ESO = [case for case in PHASES if case[0] in ("eso_a", "eso_b")]


@pytest.mark.parametrize("case", ESO, ids=str)
def test_orders_put_clean_first_then_masked_then_padding(case):
    _, valid, labelled = label(*case)
    order = labelled.tokens.position[:, :LENGTH]
    masked = np.take_along_axis(masked_in_text_order(labelled), order, axis=1)
    real = np.take_along_axis(valid, order, axis=1)
    group = np.where(real, np.where(masked, 1, 0), 2)
    assert (np.diff(group, axis=1) >= 0).all()
    ascending = np.diff(order, axis=1) > 0
    within = np.diff(group, axis=1) == 0
    masked_pairs = ascending[within & masked[:, 1:]]
    clean_pairs = ascending[within & real[:, 1:] & ~masked[:, 1:]]
    if case[2] == "sequential":
        assert masked_pairs.all()
    else:
        assert 0.4 < masked_pairs.mean() < 0.6
    if clean_pairs.size:
        if case[0] == "eso_a" and case[2] == "sequential":
            assert clean_pairs.all()
        else:
            assert 0.4 < clean_pairs.mean() < 0.6


def test_any_order_draws_orders_with_their_probabilities():
    """n ~ Binomial(L, α₀) positions in random order, then the rest sorted; all predicted."""
    batch, alpha_0 = 20_000, 0.4
    x = np.tile(np.array([0, 2, 3, 0], np.int32), (batch, 1))
    valid = np.ones_like(x, bool)
    labelled = eso_b.any_order(KEY, x, valid, alpha_0=alpha_0, special=toy.SPECIAL)
    assert (np.asarray(labelled.weight) == 1).all()
    assert (np.asarray(labelled.tokens.token[:, :4]) == toy.MASK).all()
    want = {}
    for n in range(5):
        orders = toy.orders_given(n)
        for order in orders:
            share = toy.probability_of(n, alpha_0) / len(orders)
            want[order] = want.get(order, 0) + share
    drawn, counts = np.unique(
        np.asarray(labelled.tokens.position[:, :4]), axis=0, return_counts=True
    )
    by_order = dict(zip(map(tuple, drawn.tolist()), counts, strict=True))
    counts = np.array([by_order.get(order, 0) for order in want])
    assert toy.p_value(counts, np.array(list(want.values()))) > 1e-3


@pytest.mark.parametrize("case", PHASES, ids=str)
def test_logits_of_real_tokens_do_not_depend_on_what_the_padding_holds(case):
    x, valid, labelled = label(*case)
    other = drawing(*case)(KEY, np.where(valid, x, (x + 2) % 4), valid)
    np.testing.assert_array_equal(labelled.weight, other.weight)
    predicted = labelled.weight > 0
    np.testing.assert_array_equal(labelled.target[predicted], np.asarray(other.target)[predicted])
    with compiling(fast=False):  # to the last bit, also with optimizations
        before, after = (np.asarray(toy.logits_of(case.tokens)) for case in (labelled, other))
    np.testing.assert_array_equal(before[:, :LENGTH][predicted], after[:, :LENGTH][predicted])


@pytest.mark.parametrize("case", PHASES, ids=str)
def test_the_key_alone_decides_what_is_drawn(case):
    x, valid, labelled = label(*case)
    again = drawing(*case)(KEY, x, valid)
    np.testing.assert_array_equal(labelled.tokens.token, again.tokens.token)
    if case not in (("ar", 0.0, "ar"), ("eso_b", 0.0, "sequential")):
        other = drawing(*case)(jax.random.key(1), x, valid)
        assert (labelled.tokens.token != np.asarray(other.tokens.token)).any()
