"""The likelihood of the sampler, against the enumeration of a toy model's texts and of the passes
that draw them, written from the definitions."""

import dataclasses

import jax
import numpy as np
import pytest
import toy

from esolm_jax.errors import UserError
from esolm_jax.evaluation.sampler_likelihood import SamplerLikelihood, has_one_order
from esolm_jax.parallel import sharding
from esolm_jax.sampling import generate
from esolm_jax.sampling.engine import network
from esolm_jax.sampling.generate import Generator
from esolm_jax.sampling.plan.canvas import MASK, Canvas, Seed

pytestmark = pytest.mark.fast_compile
NETWORK = network.fold(toy.CONFIG, toy.PARAMS)
L, ALPHA_0 = toy.LENGTH, {"ar": 0.0, "mdlm": 1.0, "bd3": 1.0}
TEXTS = toy.TEXTS.tolist()


def config_of(objective, alpha_0=None, **fields):
    alpha_0 = ALPHA_0.get(objective, 0.5) if alpha_0 is None else alpha_0
    config = toy.config(objective, alpha_0)
    config.sample.update(fields)
    return config


def likelihood_of(config):
    return SamplerLikelihood(config, toy.BUILT, toy.PARAMS, NETWORK)


def log_p(config, texts=TEXTS, seed=Seed(3, 5)):  # noqa: B008
    return likelihood_of(config).log_p(texts, [seed] * len(texts))


# A schedule: exact for one draw of it


def by_passes(objective, drawn, temperature=1.0) -> np.ndarray:
    """float64 [81]: Σ over passes and their tokens, each pass uncached; row 0 of a schedule."""
    order, n = drawn.order[0].tolist(), int(drawn.num_diffusion[0])
    total, first = np.zeros(len(TEXTS)), 0
    for size in drawn.sizes[:, 0].tolist():
        rows = [toy.step(objective, text, order, first, size, n) for text in TEXTS]
        logits = toy.logits_at_end(rows, 8)[:, -size:] / temperature
        new = [[text[p] for p in order[first : first + size]] for text in TEXTS]
        found = np.take_along_axis(toy.log_probs(logits), np.array(new)[..., None], axis=-1)
        total += found[..., 0].sum(axis=1)
        first += size
    return total


SCHEDULES = [
    ("eso_b", None, {}),
    ("eso_b", None, {"steps": 2}),
    ("eso_b", 1.0, {"schedule": "strided", "steps": 2}),
    ("eso_b", None, {"schedule": "shuffled_strided", "steps": 2}),
    ("eso_b", None, {"schedule": "left_to_right"}),
    ("eso_b", None, {"schedule": "blockwise", "block_length": 2, "steps": 2}),
    ("eso_b", None, {"loop": "speculative"}),
    ("eso_a", None, {}),
    ("eso_a", 1.0, {"schedule": "strided", "steps": 3}),
    ("eso_a", None, {"schedule": "shuffled_strided"}),
    ("eso_a", None, {"schedule": "left_to_right"}),
    ("mdlm", None, {"steps": 2}),
    ("mdlm", None, {"schedule": "strided", "steps": 3}),
    ("mdlm", None, {"schedule": "shuffled_strided"}),
    ("mdlm", None, {"schedule": "left_to_right"}),
    ("bd3", None, {}),
    ("bd3", None, {"schedule": "blockwise", "steps": 2}),
    ("bd3", None, {"schedule": "left_to_right"}),
    ("ar", None, {}),
]


@pytest.mark.parametrize("objective, alpha_0, fields", SCHEDULES)
def test_every_schedule_equals_its_enumeration(objective, alpha_0, fields):
    """All 81 texts, under one draw of the schedule; their probabilities sum to 1."""
    config = config_of(objective, alpha_0, **fields)
    canvas = dataclasses.replace(Canvas.empty(1, L), seeds=(Seed(3, 5),))
    drawn = generate.make_schedule(config, canvas)
    found = log_p(config)
    np.testing.assert_allclose(found, by_passes(objective, drawn), atol=3e-5)
    assert abs(np.exp(found).sum() - 1) < 1e-5


def test_one_pass_is_the_teacher_forced_run():
    config = config_of("eso_b")
    scorer = likelihood_of(config)
    rows = [TEXTS[i][:n] for i, n in ((7, 4), (40, 2), (60, 3), (80, 4))]
    seeds = [Seed(1, n) for n in range(4)]
    canvas, text = scorer._canvas(rows, seeds)
    generator = Generator.of(config, canvas, toy.SPECIAL)
    assert scorer._is_one_pass(config, generator)
    forced = generator.log_p(scorer.network, text)
    assert (forced[1, 2:] == 0).all()  # beyond the text
    np.testing.assert_allclose(scorer.log_p(rows, seeds), forced.sum(axis=1), atol=3e-5)


def test_filters_and_temperature_are_those_of_the_draws():
    hot = config_of("eso_b", schedule="strided", steps=2, temperature=2.0)
    drawn = generate.make_schedule(hot, Canvas.empty(1, L))
    np.testing.assert_allclose(log_p(hot), by_passes("eso_b", drawn, 2.0), atol=3e-5)
    nucleus = np.exp(log_p(config_of("eso_b", schedule="strided", steps=2, top_p=0.6)))
    assert (nucleus == 0).sum() > 20 and abs(nucleus.sum() - 1) < 1e-5
    greedy = np.exp(log_p(config_of("eso_b", schedule="strided", steps=2, temperature=0.0)))
    assert sorted(greedy)[-2:] == [0, 1]


def test_known_tokens_are_conditions():
    """Σ over the texts of a prompt is 1, in the loop itself."""
    config = config_of("eso_b", schedule="strided")
    rows = [text for text in TEXTS if text[1] == 2]
    given = [[-1, 2, -1, -1]] * len(rows)
    canvas = Canvas.of(given, [Seed(0, 0)] * len(rows), vocab_size=4, mask_id=toy.MASK)
    generator = Generator.of(config, canvas, toy.SPECIAL)
    found = generator.log_p(likelihood_of(config).network, np.array(rows))
    assert (found[:, 1] == 0).all()
    assert np.exp(found.sum(axis=1, dtype=float)).sum() == pytest.approx(1, abs=1e-5)


# Confidence order: the text decides the order


def _by_confidence(objective, text, most, threshold) -> float:
    """log p of a text given its first token, pass by pass, each conditional by an uncached pass."""
    known, total = [0], 0.0
    while left := [p for p in range(L) if p not in known]:
        rows = []
        for place in left:
            if objective == "mdlm":
                masks = [p for p in left if p != place] + [place]
                rank = [0] * L
            else:
                masks, rank = [place], [*range(len(known) + 1)]
            tokens = [text[p] for p in known] + [toy.MASK] * len(masks)
            rows.append([*zip(tokens, [*known, *masks], rank, strict=True)])
        of_place = dict(zip(left, toy.log_probs(toy.logits_at_end(rows)[:, -1]), strict=True))
        by = sorted(left, key=lambda p: -of_place[p].max())[:most]
        chosen = [by[0], *(p for p in by[1:] if of_place[p].max() >= np.log(threshold or 1e-9))]
        total += sum(of_place[p][text[p]] for p in chosen)
        known += [p for p in by if p in chosen]
    return total


@pytest.mark.parametrize("objective", ["eso_b", "mdlm"])
@pytest.mark.parametrize("most, threshold", [(1, 0.0), (2, 0.0), (3, 0.5)])
def test_confidence_order_equals_its_enumeration(objective, most, threshold):
    """Given the first token: without it, all positions of eso_b are equally confident."""
    fields = {"tokens_per_pass": most, "confidence_threshold": threshold}
    config = config_of(objective, loop="confidence", **fields)
    found = given_first(config, TEXTS)
    for first in toy.REAL:
        these = [i for i, text in enumerate(TEXTS) if text[0] == first]
        assert abs(np.exp(found[these]).sum() - 1) < 1e-5
    for i in range(0, len(TEXTS), 7):
        want = _by_confidence(objective, TEXTS[i], most, threshold)
        assert found[i] == pytest.approx(want, abs=3e-5)


def given_first(config, texts, *, draw=False):
    """log p of texts given their first tokens; with `draw`, other texts with these first tokens."""
    rows = [[text[0], MASK, MASK, MASK] for text in texts]
    seeds = [Seed(0, n) for n in range(len(rows))]
    canvas = Canvas.of(rows, seeds, vocab_size=4, mask_id=toy.MASK)
    generator, network = (
        Generator.of(config, canvas, toy.SPECIAL),
        likelihood_of(config).network,
    )
    if draw:
        return np.asarray(generator.run(network).text)
    return generator.log_p(network, np.array(texts)).sum(axis=1, dtype=np.float64)


def test_texts_drawn_in_confidence_order_follow_the_likelihood():
    config = config_of("eso_b", loop="confidence")
    texts = given_first(config, [[2, 0, 0, 0]] * 8000, draw=True)
    everything = given_first(config, TEXTS)
    everything[toy.TEXTS[:, 0] != 2] = -np.inf
    assert toy.p_of_texts(texts, everything[None]) > 1e-3


# The sampler draws from this distribution


@pytest.mark.parametrize(
    "objective, fields",
    [
        ("eso_b", {"schedule": "strided", "steps": 2}),
        ("mdlm", {"loop": "confidence", "tokens_per_pass": 2}),
    ],
)
def test_mean_over_drawn_texts_is_the_negative_entropy(objective, fields):
    config = config_of(objective, **fields)
    scorer, n = likelihood_of(config), 8000
    generator = Generator.of(config, Canvas.empty(n, L), toy.SPECIAL)
    texts = np.asarray(generator.run(scorer.network).text)
    everything = log_p(config)
    assert toy.p_of_texts(texts, everything[None]) > 1e-3
    few = texts[:1000]
    drawn = scorer.log_p(few, [Seed(0, i) for i in range(len(few))])
    p = np.exp(everything)
    error = drawn.std() / np.sqrt(len(few))
    assert abs(drawn.mean() - (p * everything).sum()) < 4 * error


# Random orders: a bound


def test_mean_probability_over_draws_is_the_likelihood():
    config = config_of("eso_b")
    exact = np.exp(toy.exact_log_p(0.5))
    chosen = [int(np.argmax(exact)), 10, 50]
    for i in chosen:
        n = 1000
        p = np.exp(likelihood_of(config).log_p([TEXTS[i]] * n, [Seed(0, row) for row in range(n)]))
        assert abs(p.mean() - exact[i]) < 4 * p.std() / np.sqrt(n)


def test_bound_of_several_orders():
    config, exact = config_of("eso_b"), -toy.exact_log_p(0.5).sum() / 81 / L
    scorer = likelihood_of(config)
    found = scorer.estimate([TEXTS[:50], TEXTS[50:]], num_orders=16, seed=0)
    assert abs(found.nll - exact) < 5 * found.standard_error < 0.02
    assert (found.num_tokens, found.error_samples) == (81 * L, 81 * 15)
    one = scorer.estimate([TEXTS], num_orders=1, seed=0)
    assert np.isnan(one.standard_error)
    np.testing.assert_allclose(  # the seeds of a row are independent of its batch
        scorer.estimate([TEXTS[:50], TEXTS[50:]], num_orders=1, seed=0).window_nll,
        one.window_nll,
        atol=2e-5,
    )


def test_exact_estimate_has_no_error():
    config = config_of("eso_b", schedule="strided", steps=2)
    estimate = likelihood_of(config).estimate([TEXTS], num_orders=0, seed=0)
    assert estimate.standard_error == 0
    np.testing.assert_allclose(-estimate.window_nll, log_p(config), atol=1e-6)


@pytest.mark.parametrize(
    "objective, alpha_0, fields, expected",
    [
        ("eso_b", None, {}, False),
        ("eso_b", 0.0, {}, True),
        ("eso_b", None, {"schedule": "shuffled_strided"}, False),
        ("eso_b", None, {"schedule": "strided"}, True),
        ("eso_b", None, {"loop": "confidence"}, True),
        ("bd3", None, {}, False),
        ("bd3", None, {"schedule": "left_to_right"}, True),
        ("ar", None, {}, True),
    ],
)
def test_one_order(objective, alpha_0, fields, expected):
    """One order: the same schedule for every seed, unless the text decides the order."""
    config = config_of(objective, alpha_0, **fields)
    assert has_one_order(config) == expected
    rows, seeds = [[MASK] * L] * 9, [Seed(seed, 0) for seed in range(9)]
    canvas = Canvas.of(rows, seeds, vocab_size=4, mask_id=toy.MASK)
    drawn = generate.make_schedule(config, canvas)
    is_same = (drawn.order == drawn.order[:1]).all()
    assert is_same == expected


# Batches, devices, bad input


def test_a_row_depends_neither_on_the_batch_nor_on_the_devices():
    rows = [TEXTS[5], TEXTS[50][:2], TEXTS[77]]
    seeds = [Seed(2, n) for n in range(3)]
    config = config_of("eso_b", steps=2)
    together = likelihood_of(config).log_p(rows, seeds)
    alone = likelihood_of(config).log_p(rows[1:2], seeds[1:2])
    assert alone[0] == pytest.approx(together[1], abs=2e-5)
    config.mesh.devices = 4
    mesh = sharding.make_mesh(config.mesh)
    params = jax.device_put(toy.PARAMS, sharding.parameters(mesh, toy.PARAMS))
    scorer = SamplerLikelihood.of(config, toy.built_on(mesh), params)
    np.testing.assert_allclose(scorer.log_p(rows, seeds), together, atol=2e-5)


@pytest.mark.parametrize(
    "objective, fields, texts, told",
    [
        ("eso_b", {"stop_at_eos": True}, TEXTS[:1], "sample.stop_at_eos=True: must be False"),
        ("eso_b", {}, TEXTS[:1], "num_orders=0: must be positive: sample.schedule='ancestral'"),
        ("eso_b", {"loop": "confidence"}, [[]], "each at least one token"),
        ("eso_b", {"loop": "confidence"}, [], "at least one text"),
        ("mdlm", {"loop": "confidence"}, [[0] * 9], "config.sample.length=9: must be at most"),
        ("eso_b", {"loop": "confidence"}, [[0, 1]], "token 1 at position 1 is the mask token"),
        ("eso_b", {"loop": "confidence"}, [[0, 9]], "token 9 at position 1 is not in 0..3"),
        ("ar", {"loop": "confidence"}, TEXTS[:1], "sample.loop='confidence': must be plain"),
        ("mdlm", {"loop": "llada"}, TEXTS[:1], "sample.loop='llada': must be plain"),
    ],
)
def test_bad_input(objective, fields, texts, told):
    config = config_of(objective, **fields)
    with pytest.raises(UserError, match=told):
        likelihood_of(config).estimate([texts] if texts else [], num_orders=0, seed=0)
