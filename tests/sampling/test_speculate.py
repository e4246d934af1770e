"""Speculation: exactly the distribution of one token a pass, in fewer passes."""

import dataclasses

import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
import toy
from thorough import thorough

from esolm_jax.config import DRAFT_STYLES
from esolm_jax.family import eso_b
from esolm_jax.sampling.engine import network
from esolm_jax.sampling.engine.choose import TokenSampler
from esolm_jax.sampling.loops import drafts, speculative
from esolm_jax.sampling.loops.loop import row_keys
from esolm_jax.sampling.plan import passes, schedule
from esolm_jax.sampling.plan.canvas import MASK, Canvas, Seed

NETWORK = network.fold(toy.CONFIG, toy.PARAMS)
# A model whose tokens depend on each other far more, so that many drafts fail.
SHARP = network.fold(
    toy.CONFIG, toy.PARAMS | {"logits": jax.tree.map(lambda a: 4 * a, toy.PARAMS["logits"])}
)
CHOICE = TokenSampler(toy.MASK)
L = toy.LENGTH
MANY = 16_000  # texts: enough to see the two faults below


def plan(canvas, alpha_0=0.5):
    config = toy.config("eso_b", alpha_0, canvas.token.shape[1])
    drawn = schedule.ancestral(canvas, alpha_0, 0)
    return passes.plan(config, drawn, mask_id=toy.MASK, start_token=toy.START)


def run(canvas, *, alpha_0=0.5, choice=CHOICE, of=NETWORK, **kwargs):
    keys = row_keys(canvas.seeds)
    found, counts = loops.speculate(of, plan(canvas, alpha_0), choice, keys, **kwargs)
    return np.asarray(found.text), found, jax.tree.map(np.asarray, counts)


@pytest.mark.parametrize(
    ("style", "k", "alpha_0", "seed"),
    [
        ("chain", 4, 0.0, 0),  # k = 2 is that of the prompts
        ("chain", 4, 0.5, 0),
        pytest.param("chain", 4, 0.5, 1, marks=thorough),
        ("staircase", 3, 0.5, 0),
        ("staircase", 3, 1.0, 0),
        pytest.param("staircase", 3, 0.5, 1, marks=thorough),
    ],
)
def test_texts_follow_the_distribution_of_one_token_a_pass(alpha_0, style, k, seed):
    texts, _, counts = run(Canvas.empty(MANY, L, seed), alpha_0=alpha_0, style=style, k=k)
    assert toy.p_of_texts(texts, toy.exact_log_p(alpha_0)[None]) > 1e-3
    assert 0.5 < counts["accepted"].sum() / counts["proposed"].sum() < 0.98


def test_the_test_would_see_drafts_that_nobody_verified():
    """All tokens in one pass, from the same masks: what they are drafted from."""
    drawn = schedule.ancestral(Canvas.empty(MANY, L), 0.5, 0)
    parallel = schedule.Schedule(drawn.order, np.array([L]), drawn.num_diffusion)
    tables = passes.make_plan(eso_b.FAMILY, parallel, mask_id=toy.MASK)
    keys = row_keys(Canvas.empty(MANY, L).seeds)
    texts = loops.decode(NETWORK, tables, CHOICE, keys).text
    assert toy.p_of_texts(texts, toy.exact_log_p(0.5)[None]) < 1e-9


@pytest.mark.usefixtures("compiled_fast")
@pytest.mark.parametrize("always", [True, False])
def test_the_test_would_see_a_wrong_verification(monkeypatch, always):
    """Accept everything; or redraw from p in place of (p − q)₊."""
    if always:
        wrong = lambda keys_BP: jnp.full(keys_BP.shape, -jnp.inf)  # noqa: E731
        monkeypatch.setattr(speculative, "log_uniform", wrong)
    else:
        true = drafts._verify

        def verify(s, log_p, token, log_u):
            accepted, _, rejected = true(s, log_p, token, log_u)
            return accepted, log_p[jnp.arange(len(token)), accepted], rejected

        monkeypatch.setattr(drafts, "_verify", verify)
    jax.clear_caches()
    texts, _, _ = run(Canvas.empty(MANY, L), k=3)
    jax.clear_caches()
    assert toy.p_of_texts(texts, toy.exact_log_p(0.5)[None]) < 1e-4


@pytest.mark.parametrize("style", ["chain", pytest.param("staircase", marks=thorough)])
def test_filtered_choices_are_followed(style):
    """Temperature and top-k: against one token a pass, text by text."""
    choice = dataclasses.replace(CHOICE, temperature=0.7, top_k=2)
    canvas = Canvas.empty(MANY, L)
    texts, _, _ = run(canvas, choice=choice, style=style, k=3)
    other = Canvas.empty(MANY, L, seed=1)
    plain = loops.decode(NETWORK, plan(other), choice, row_keys(other.seeds)).text
    base = toy.CONFIG.vocab_size ** np.arange(L)
    counts = [np.bincount(np.asarray(t) @ base, minlength=4**L) for t in (texts, plain)]
    both = np.sum(counts, axis=0)
    many = both >= 20
    chi2 = ((counts[0] - counts[1])[many] ** 2 / both[many]).sum()  # two samples of one size
    p = float(jax.scipy.special.gammaincc((many.sum() - 1) / 2, chi2 / 2))
    assert p > 1e-3 and many.sum() >= 16  # two tokens at four places


@pytest.mark.usefixtures("compiled_fast")
def test_prompts_are_given_and_the_rest_follows_them_exactly():
    """Infilling: tokens 1 and 3 are known."""
    known = {1: 2, 3: 0}
    row = [known.get(i, MASK) for i in range(L)]
    seeds = [Seed(0, b) for b in range(MANY)]
    canvas = Canvas.of([row] * MANY, seeds, vocab_size=4, mask_id=toy.MASK)
    among = toy.TEXTS[(toy.TEXTS[:, 1] == 2) & (toy.TEXTS[:, 3] == 0)]
    log_p = toy.text_log_p("eso_b", among, [(1, 3, 0, 2), (1, 3, 2, 0)], given=2)
    p = np.exp(log_p)
    exact = 0.25 * p[0] + 0.5 * p.mean(axis=0) + 0.25 * p.mean(axis=0)  # n = 0, 1, 2 by diffusion
    # n = 1: either position first; n = 0: left to right.
    for style in DRAFT_STYLES:
        texts, found, _ = run(canvas, style=style, k=2)
        assert (np.asarray(found.revealed_at)[:, [1, 3]] == -1).all()
        assert toy.p_of_texts(texts, np.log(exact)[None], among) > 1e-3


LENGTH = 24


@pytest.mark.usefixtures("compiled_fast")
@pytest.mark.parametrize(
    ("style", "settings"),
    [
        ("chain", [(2, False), (4, True)]),
        ("staircase", [(5, False), (3, True)]),
    ],
)
def test_greedy_is_greedy_however_many_tokens_a_pass(style, settings):
    """On a model of which most drafts fail, with rows of different prompts."""
    rows = [
        [MASK] * LENGTH,
        [0, 2, 3, *[MASK] * (LENGTH - 3)],
        [3, MASK, 2, *[MASK] * (LENGTH - 5)],
    ]
    seeds = [Seed(0, b) for b in range(len(rows))]
    canvas = Canvas.of(rows, seeds, vocab_size=4, mask_id=toy.MASK)
    greedy, keys = TokenSampler(toy.MASK, temperature=0), row_keys(canvas.seeds)
    want = loops.decode(SHARP, plan(canvas), greedy, keys)
    for k, adaptive in settings:
        texts, found, counts = run(
            canvas, choice=greedy, of=SHARP, k=k, style=style, adaptive=adaptive
        )
        np.testing.assert_array_equal(texts, want.text)
        assert (counts["accepted"] <= counts["proposed"]).all()
        assert counts["proposed"].sum() > 0
        # Passes number the tokens one after the other, at most k of a row in each.
        revealed = np.asarray(found.revealed_at)
        for row, length in enumerate(canvas.length):
            passes_of = revealed[row, :length][revealed[row, :length] >= 0]
            assert np.bincount(passes_of).max() <= k
            assert len(passes_of) == length - canvas.num_known[row]


@pytest.mark.usefixtures("compiled_fast")
def test_a_row_depends_on_itself_alone():
    """Adaptive: how far a row reaches is its own affair."""
    rows = [[MASK] * LENGTH, [0, *[MASK] * (LENGTH - 1)], [2, 3, MASK, 0, *[MASK] * 10]]
    seeds = [Seed(0, 0), Seed(5, 0), Seed(5, 2)]
    whole = Canvas.of(rows, seeds, vocab_size=4, mask_id=toy.MASK)
    together, _, _ = run(whole, of=SHARP, k=4, adaptive=True)
    # Of the same size, to compile once: sizes of batches are those of test_sampling.py.
    others = [rows[2], [3] * LENGTH, [MASK, 0, *[MASK] * (LENGTH - 2)]]
    changed = Canvas.of(others, [seeds[2], Seed(1, 1), Seed(1, 0)], vocab_size=4, mask_id=toy.MASK)
    again, _, _ = run(changed, of=SHARP, k=4, adaptive=True)
    np.testing.assert_array_equal(again[0, : len(rows[2])], together[2, : len(rows[2])])
    assert (again[2] != together[0]).any()
