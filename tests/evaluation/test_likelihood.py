"""Likelihoods and their bounds, against the exact ones of a toy model whose 81 texts and 24 orders
are all listed."""

import functools
import itertools

import jax
import numpy as np
import pytest
import toy

from esolm_jax.evaluation import likelihood
from esolm_jax.family import eso_b
from esolm_jax.model import lm_head as loss

pytestmark = pytest.mark.fast_compile  # as for users: test_protocol_nelbo.py

L = toy.LENGTH


def batch(repeats=1, texts=toy.TEXTS):
    x = np.tile(texts, (repeats, 1))
    return {"x": x, "valid": np.ones_like(x, bool)}


@functools.cache
def nelbo(objective, alpha_0):
    return likelihood.make_nelbo(toy.config(objective, alpha_0), toy.BUILT)


@functools.cache
def importance_weighted(alpha_0):
    return likelihood.make_importance_weighted(toy.config("eso_b", alpha_0), toy.BUILT)


def estimate_nelbo(objective, alpha_0, batches, num_samples, seed=0):
    run = nelbo(objective, alpha_0)
    return run(toy.PARAMS, batches, num_samples=num_samples, seed=seed)


def estimate_importance_weighted(alpha_0, batches, num_orders):
    run = importance_weighted(alpha_0)
    return run(toy.PARAMS, batches, num_orders=num_orders, seed=0)


@functools.cache
def exact_log_p(n):
    """[orders with n diffusion tokens, 81], by steps of one token each."""
    return toy.text_log_p("eso_b", toy.TEXTS, toy.orders_given(n))


def orders_with_probabilities(alpha_0):
    """log p_σ(x) [orders, 81] and P(σ) [orders]."""
    log_p, share = [], []
    for n in range(L + 1):
        if toy.probability_of(n, alpha_0) > 0:
            log_p.append(exact_log_p(n))
            orders = len(log_p[-1])
            share += [toy.probability_of(n, alpha_0) / orders] * orders
    return np.concatenate(log_p), np.array(share)


def exact_nll(alpha_0):
    """−log Σ_σ P(σ) p_σ(x), [81]."""
    log_p, share = orders_with_probabilities(alpha_0)
    return -np.log(share @ np.exp(log_p))


# The any-order likelihood


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0)])
def test_probabilities_of_all_texts_under_one_order_sum_to_one(order):
    everything = np.ones(toy.TEXTS.shape, bool)
    labelled = eso_b.label_sequential(
        toy.TEXTS, everything, everything, np.tile(np.int32(order), (81, 1)), everything,
        mask=toy.MASK,
    )  # fmt: skip
    nll = jax.jit(functools.partial(likelihood.labelled_nll, toy.apply, toy.BUILT.head))
    log_p = -np.asarray(nll(toy.PARAMS, labelled), np.float64)
    assert abs(np.exp(log_p).sum() - 1) < 1e-5
    step_by_step = toy.text_log_p("eso_b", toy.TEXTS, [order])[0]
    np.testing.assert_allclose(log_p, step_by_step, atol=2e-5)


def test_orders_of_the_toy_model_matter():
    assert exact_log_p(L).std(axis=0).mean() > 0.1


def test_importance_weighted_bound_falls_to_the_exact_nll():
    """Of the texts whose probability depends most on the order."""
    alpha_0, repeats, orders = 0.5, 150, (1, 2, 16)
    log_p, share = orders_with_probabilities(alpha_0)
    chosen = np.argsort(-log_p.var(axis=0))[:16]
    log_p = log_p[:, chosen]
    exact = exact_nll(alpha_0)[chosen].mean() / L
    values = {1: -log_p, 2: -np.logaddexp(log_p[:, None], log_p[None]) + np.log(2)}
    weights = {1: share, 2: share[:, None] * share[None]}
    batches = [batch(repeats, toy.TEXTS[chosen])]
    estimates = {k: estimate_importance_weighted(alpha_0, batches, k) for k in orders}
    for k in (1, 2):
        weight = weights[k][..., None]
        axes = tuple(range(k))
        mean = (weight * values[k]).sum(axes)
        spread = (weight * (values[k] - mean) ** 2).sum(axes)
        error = np.sqrt(spread.sum() / repeats) / (len(chosen) * L)
        assert abs(estimates[k].nll - mean.mean() / L) < 4 * error
        assert mean.mean() / L > exact + 5 * error  # the test can tell the bounds apart
    assert np.isnan(estimates[1].standard_error)
    bounds = [estimates[k].nll for k in orders]
    errors = [estimates[k].standard_error for k in orders[1:]]
    for k, error in enumerate(errors):
        assert bounds[k] > bounds[k + 1] + 2 * error
    assert abs(bounds[-1] - exact) < (bounds[0] - exact) / 10


@pytest.mark.parametrize("alpha_0", [0.5, 1.0])
def test_importance_weighted_bound_with_many_orders_is_the_exact_nll(alpha_0):
    estimate = estimate_importance_weighted(alpha_0, [batch(texts=toy.TEXTS[::3])], 512)
    exact = exact_nll(alpha_0)[::3].mean() / L
    assert abs(estimate.nll - exact) < 4 * estimate.standard_error + 2e-5
    assert estimate.standard_error < 2e-3
    assert estimate.num_tokens == 27 * L


def test_error_of_log_mean_exp_is_its_spread():
    rng = np.random.default_rng(0)
    log_p = rng.normal(-300, 0.7, (4000, 128))  # exp underflows in float32
    log_mean, variance = likelihood.log_mean_exp(log_p)
    want = np.log(np.exp(log_p + 300).mean(axis=1)) - 300
    np.testing.assert_allclose(log_mean, want, rtol=1e-12)
    assert abs(variance.mean() / log_mean.var() - 1) < 0.1
    log_mean, variance = likelihood.log_mean_exp(log_p[:, :1])
    np.testing.assert_allclose(log_mean, log_p[:, 0])
    assert np.isnan(variance).all()
    log_mean, variance = likelihood.log_mean_exp(np.full((2, 3), -5000.0))
    np.testing.assert_array_equal(log_mean, -5000)
    np.testing.assert_array_equal(variance, 0)


# The NELBO


def masked_nll(objective, clean, late, predicted):
    """−log p of each of `predicted` [81, predicted], given the text at `clean` and masks at `late`,
    each in generation order, all of them there at once."""
    rows = []
    for text, p in itertools.product(toy.TEXTS, predicted):
        count = late.index(p) + 1 if objective == "eso_b" else len(late)
        row = toy.step(objective, text, clean + late, len(clean), count)
        own = next(i for i, (token, q, _) in enumerate(row) if q == p and i >= len(clean))
        rows.append([*row[:own], *row[own + 1 :], row[own]])  # it comes last
    log_p = toy.log_probs(toy.logits_at_end(rows)[:, -1]).reshape(81, len(predicted), -1)
    target = toy.TEXTS[:, list(predicted)]
    return -np.take_along_axis(log_p, target[..., None], axis=2)[..., 0]


def subsets():
    return itertools.chain(*(itertools.combinations(range(L), n) for n in range(1, L + 1)))


@functools.cache
def diffusion_terms(objective):
    """{number of masks: Σ over where they are of the mean over orders of Σ nll}, each [81]."""
    terms = {n: np.zeros(81) for n in range(1, L + 1)}
    for late in subsets():
        clean = tuple(p for p in range(L) if p not in late)
        if objective == "mdlm":
            orders = [(clean, late)]
        else:
            orders = list(itertools.product(*map(itertools.permutations, (clean, late))))
        for order in orders:
            nll = masked_nll(objective, *order, order[1]).sum(axis=1)
            terms[len(late)] += nll / len(orders)
    return terms


@functools.cache
def exact_nelbo(objective, alpha_0):
    """[81]: the integral over time and the sums over masks and orders, carried out."""
    total = np.zeros(81)
    points = 4000
    t = 1e-3 + (1 - 1e-3) * (np.arange(points) + 0.5) / points
    a = alpha_0 * (1 - (1 - 1e-3) * t)
    weight = alpha_0 * (1 - 1e-3) / (1 - a)
    if alpha_0 > 0:
        for n, term in diffusion_terms(objective).items():
            total += term * np.mean(weight * (1 - a) ** n * a ** (L - n))
    if alpha_0 < 1:  # masks left to right, each after the clean tokens and the text before it
        for late in subsets():
            clean = [p for p in range(L) if p not in late]
            share = (1 - alpha_0) ** len(late) * alpha_0 ** len(clean)
            orders = list(itertools.permutations(clean))
            for order, (i, p) in itertools.product(orders, enumerate(late)):
                term = masked_nll(objective, order + late[:i], (p,), (p,))[:, 0]
                total += share * term / len(orders)
    return total


@pytest.mark.parametrize(("objective", "alpha_0"), [("eso_b", 0.5), ("eso_b", 1.0), ("mdlm", 1.0)])
def test_nelbo_is_the_integral_over_time_masks_and_orders(objective, alpha_0):
    exact = exact_nelbo(objective, alpha_0).mean() / L
    estimate = estimate_nelbo(objective, alpha_0, [batch(20)] * 4, num_samples=8)
    assert estimate.num_tokens == 4 * 20 * 81 * L
    assert estimate.standard_error < 0.015
    assert abs(estimate.nll - exact) < 4 * estimate.standard_error


def test_nelbo_of_every_text_lies_above_the_exact_nll_of_mdlm():
    """Carried out as above. A step reads the same masks in both, so that it is a theorem."""
    log_p = toy.text_log_p("mdlm", toy.TEXTS, toy.orders_given(L))
    exact = -np.log(np.exp(log_p).mean(axis=0))
    gap = exact_nelbo("mdlm", 1.0) - exact
    assert (gap > -0.002 * exact).all()  # both ends of time are left out, ε of it each
    assert gap.mean() > 0.01


@functools.cache
def p_of_a_step():
    """{(known positions, position): p of the text there, [81]}: on the whole canvas, the mean over
    orders of the known tokens and of the masks."""
    p = {}
    for late in subsets():
        clean = tuple(q for q in range(L) if q not in late)
        orders = list(itertools.product(*map(itertools.permutations, (clean, late))))
        rows = [np.exp(-masked_nll("eso_b", *order, late)) for order in orders]
        p |= {(clean, q): column for q, column in zip(late, np.mean(rows, axis=0).T, strict=True)}
    return p


def p_on_the_whole_canvas(alpha_0):
    """[81]: of the sampler that the NELBO of eso_b bounds (likelihood.py): every step of the
    diffusion phase draws a new order and reveals one token; the sequential phase keeps its own."""
    total = np.zeros(81)
    for late in [(), *subsets()]:
        clean = [q for q in range(L) if q not in late]
        share = (1 - alpha_0) ** len(late) * alpha_0 ** len(clean)
        if share == 0:
            continue
        orders = list(itertools.permutations(clean))
        diffusion = sum(
            np.prod([p_of_a_step()[tuple(sorted(o[:i])), q] for i, q in enumerate(o)], axis=0)
            * np.ones(81)
            for o in orders
        )
        sequential = sum(
            np.prod(
                [
                    np.exp(-masked_nll("eso_b", o + late[:i], (q,), (q,))[:, 0])
                    for i, q in enumerate(late)
                ],
                axis=0,
            )
            * np.ones(81)
            for o in orders
        )
        total += share * diffusion * sequential / len(orders) ** 2
    return total


@pytest.mark.parametrize("alpha_0", [0.5, 1.0])
def test_nelbo_of_every_text_bounds_the_sampler_on_the_whole_canvas(alpha_0):
    p = p_on_the_whole_canvas(alpha_0)
    assert abs(p.sum() - 1) < 1e-5
    gap = exact_nelbo("eso_b", alpha_0) + np.log(p)
    assert (gap > 0.002 * np.log(p)).all()  # both ends of time are left out, ε of it each
    assert gap.mean() > 0.01


@pytest.mark.parametrize("alpha_0", [0.5, 1.0])
def test_nelbo_and_any_order_bound_are_of_two_distributions(alpha_0):
    """Neither lies above the other: at K = 1, where both are Jensen's, there are texts either way;
    texts whose NELBO is below the exact NLL of one token per step."""
    log_p, share = orders_with_probabilities(alpha_0)
    over_one_order = exact_nelbo("eso_b", alpha_0) - -(share @ log_p)
    over_exact = exact_nelbo("eso_b", alpha_0) - exact_nll(alpha_0)
    # The ends of time, left out, are worth less than 0.01.
    assert over_one_order.min() < -0.015 and over_one_order.max() > 0.03
    assert over_exact.min() < -0.01
    assert abs(np.exp(-exact_nll(alpha_0)) - p_on_the_whole_canvas(alpha_0)).max() > 1e-3


def test_importance_weighted_bound_does_not_rise_with_more_orders():
    """For every text: the expectations with 1, 2 and 3 orders, carried out."""
    log_p, share = orders_with_probabilities(0.5)
    p, means = np.exp(log_p), []
    for k in (1, 2, 3):
        total, weight = np.zeros((1, 81)), np.ones(1)
        for _ in range(k):
            total = (total[:, None] + p[None]).reshape(-1, 81)
            weight = (weight[:, None] * share[None]).reshape(-1)
        means.append(-(weight @ np.log(total / k)))
    assert (means[0] > means[1]).all() and (means[1] > means[2]).all()
    assert (means[2] > exact_nll(0.5)).all()


def test_nelbo_of_eso_b_at_alpha_0_equal_to_0_is_the_exact_nll():
    for text in toy.TEXTS[::20]:
        estimate = estimate_nelbo("eso_b", 0.0, [batch(1, text[None])], num_samples=2)
        exact = -toy.text_log_p("eso_b", text[None], [tuple(range(L))])[0, 0] / L
        assert abs(estimate.nll - exact) < 2e-6
        assert estimate.standard_error < 1e-7


def test_nelbo_of_ar_is_the_sum_of_log_probabilities():
    estimate = estimate_nelbo("ar", 0.0, [batch()], num_samples=5)
    log_p = toy.text_log_p("ar", toy.TEXTS, [tuple(range(L))])[0]
    assert abs(np.exp(log_p).sum() - 1) < 1e-6
    assert abs(estimate.nll - -log_p.mean() / L) < 2e-6
    assert estimate.standard_error == 0
    assert abs(estimate.perplexity - np.exp(-log_p.mean() / L)) < 1e-5


def test_standard_error_of_the_nelbo_is_its_spread_over_seeds():
    estimates = [estimate_nelbo("eso_b", 0.5, [batch()] * 2, 3, seed) for seed in range(40)]
    spread = np.std([e.nll for e in estimates], ddof=1)
    claimed = np.sqrt(np.mean([e.standard_error**2 for e in estimates]))
    assert 0.7 < claimed / spread < 1.4
    one_draw = estimate_nelbo("eso_b", 0.5, [batch()], 1)
    assert np.isnan(one_draw.standard_error)


@pytest.mark.parametrize("objective", ["ar", "eso_b"])
def test_padded_windows_count_their_real_tokens_alone(objective):
    """Both families are exact at α₀ = 0; the last row of the batch is only a filler."""
    real = np.array([4, 3, 1, 2, 0])
    x = toy.TEXTS[[5, 17, 33, 60, 70]]
    padded = {"x": x, "valid": np.arange(L) < real[:, None]}
    estimates = [estimate_nelbo(objective, 0.0, [padded], num_samples=1)]
    if objective == "eso_b":
        estimates.append(estimate_importance_weighted(0.0, [padded], 3))
    log_p = [
        toy.text_log_p(objective, row[None, :count], [tuple(range(count))])[0, 0]
        for row, count in zip(x, real, strict=True)
        if count
    ]
    for estimate in estimates:
        assert estimate.num_tokens == real.sum()
        assert abs(estimate.nll - -sum(log_p) / real.sum()) < 2e-6


def test_importance_weighted_bound_of_a_padded_text_is_that_of_the_text():
    """Three real tokens and one of padding, at α₀ = 1: all 6 orders of the three."""
    x = toy.TEXTS[[5, 17, 33, 60]]
    padded = {"x": x, "valid": np.tile(np.arange(L) < 3, (4, 1))}
    estimate = estimate_importance_weighted(1.0, [padded], 2000)
    log_p = toy.text_log_p("eso_b", x[:, :3], list(itertools.permutations(range(3))))
    exact = -np.log(np.exp(log_p).mean(axis=0)).mean() / 3
    assert abs(estimate.nll - exact) < 4 * estimate.standard_error
    assert estimate.standard_error < 2e-3


def test_mask_token_has_no_probability():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 4))
    total = sum(
        np.exp(-loss.token_nll(logits, np.full((2, 3), token), toy.MASK)) for token in toy.REAL
    )
    np.testing.assert_allclose(total, 1, atol=1e-6)
