"""Conditional likelihoods of answers, against products of a toy model's uncached passes."""

import numpy as np
import pytest
import toy
from thorough import thorough

from esolm_jax.errors import UserError
from esolm_jax.evaluation.answer_likelihood import AnswerLikelihood, Pair, rolling_windows

pytestmark = pytest.mark.fast_compile
ALPHA_0 = {"ar": 0.0, "mdlm": 1.0, "bd3": 1.0}
L = toy.LENGTH
PAIRS = [Pair([], [0, 2, 3, 0]), Pair([2], [3, 3, 0]), Pair([0, 3], [2, 2]), Pair([3, 2, 0], [3])]


def scorer(objective, **fields):
    config = toy.config(objective, ALPHA_0.get(objective, 0.5))
    return AnswerLikelihood(config, toy.BUILT, toy.PARAMS, **{"batch_size": 4} | fields)


def brute(objective, pair) -> tuple[float, bool]:
    """Left to right, one uncached pass per token of the answer."""
    text, order = pair.ids, tuple(range(len(pair.ids)))
    total, greedy = 0.0, True
    for at in range(len(pair.prompt), len(text)):
        row = toy.step(objective, text, order, at, 1, num_diffusion=len(pair.prompt))
        log_p = toy.log_probs(toy.logits_at_end([row])[0, -1])
        total += log_p[text[at]]
        greedy &= int(log_p.argmax()) == text[at]
    return total, greedy


def greedy_answer(objective, prompt) -> list[int]:
    text = list(prompt)
    for at in range(len(prompt), L):
        filled, order = [*text, *[0] * (L - at)], tuple(range(L))
        row = toy.step(objective, filled, order, at, 1, num_diffusion=len(prompt))
        text.append(int(toy.log_probs(toy.logits_at_end([row])[0, -1]).argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("objective", ["eso_b", "ar", "eso_a", "mdlm", "bd3"])
def test_score_is_the_product_of_the_passes(objective):
    """And is_greedy is whether each token is the likeliest one."""
    pairs = [*PAIRS, Pair([2, 0], greedy_answer(objective, [2, 0]))]
    for pair, (value, greedy) in zip(pairs, scorer(objective).score(pairs), strict=True):
        want, is_greedy = brute(objective, pair)
        assert value == pytest.approx(want, abs=3e-5)
        assert greedy == is_greedy
    assert greedy


@pytest.mark.parametrize(
    "objective", ["mdlm", *(pytest.param(other, marks=thorough) for other in ("bd3", "eso_a"))]
)
def test_pairs_that_are_shorter_than_their_padded_row(objective):
    pair = Pair([2], [3, 0])
    ((alone, _),) = scorer(objective, batch_size=1).score([pair])
    assert alone == pytest.approx(brute(objective, pair)[0], abs=3e-5)
    (_, (together, _)) = scorer(objective).score([PAIRS[1], pair])
    assert together == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("num_orders", [0, 3])
def test_values_depend_neither_on_the_batch_nor_on_its_order(num_orders):
    pairs = [*PAIRS, Pair([2], [0]), Pair([], []), Pair([0], [2, 2])]
    want = scorer("eso_b", batch_size=1, num_orders=num_orders).score(pairs)
    assert want[5] == (0.0, True)
    for size in (3, 64):
        found = scorer("eso_b", batch_size=size, num_orders=num_orders).score(pairs[::-1])[::-1]
        np.testing.assert_allclose(found, want, atol=1e-6)


def test_several_orders_bound_the_likelihood_under_random_orders():
    """exp(value) at K = 1, averaged over seeds, is the mean over orders of the answer."""
    config = toy.config("eso_b", 0.5)
    pair, runs = Pair([2], [3, 3, 0]), 300
    found = [
        AnswerLikelihood(config, toy.BUILT, toy.PARAMS, 1, num_orders=1, seed=seed).score([pair])
        for seed in range(0, 10 * runs, 10)
    ]
    p = np.exp([value for ((value, _),) in found])
    want = 0.0
    for n in range(4):
        orders = [(0, *(1 + q for q in rest)) for rest in toy.orders_given(n, 3)]
        log_p = toy.text_log_p("eso_b", [pair.ids], orders, given=1)
        want += toy.probability_of(n, 0.5, 3) * np.exp(log_p).mean()
    assert abs(p.mean() - want) < 4 * p.std() / np.sqrt(runs)
    assert p.std() > 0


def test_rolling_windows_score_each_token_once():
    for length in (2, 3, 7):
        for total in range(20):
            windows = rolling_windows(total, length)
            assert [i for _, new, end in windows for i in range(new, end)] == [*range(total)]
            assert all(end - start <= length for start, _, end in windows)
            assert all(new > start for start, new, _ in windows[1:])
            if total >= length:
                assert all(end - start == length for start, _, end in windows)
    with pytest.raises(UserError, match="max_length=1: must be at least 2"):
        rolling_windows(3, 1)


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: scorer("eso_b", batch_size=0), "batch_size=0: must be a positive multiple"),
        (lambda: scorer("mdlm", num_orders=2), "num_orders=2: must be 0 .exact. with objective"),
        (lambda: scorer("eso_b").score([Pair([0] * 9, [0])]), "request 0: has 10 tokens"),
        (lambda: scorer("eso_b").score([Pair([0], [9])]), "token 9 at position 1 is not in"),
    ],
)
def test_bad_input(make, told):
    with pytest.raises(UserError, match=told):
        make()
