"""Layouts say what the labels are; query copies that reach no loss can be left out."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from compilation import compiling

from esolm_jax.attention import flash
from esolm_jax.family import trim
from esolm_jax.family.labels import Layout
from esolm_jax.family.phase import make_phases
from esolm_jax.model import transformer as model
from esolm_jax.model.lm_head import Head
from esolm_jax.parallel import sharding
from esolm_jax.training import phase_loss

pytestmark = pytest.mark.fast_compile  # except for losses and gradients

LENGTH, ROWS, BLOCK, MULTIPLE = 16, 8, 4, 4
PHASES = [  # objective, α₀, phase, its layout
    ("ar", 0.0, "ar", Layout(LENGTH)),
    ("mdlm", 1.0, "diffusion", Layout(LENGTH, block=LENGTH)),
    ("bd3", 1.0, "diffusion", Layout(LENGTH, LENGTH, BLOCK)),
    ("eso_b", 0.5, "diffusion", Layout(LENGTH)),
    ("eso_b", 0.5, "sequential", Layout(LENGTH, LENGTH)),
    ("eso_a", 0.5, "diffusion", None),
    ("eso_a", 0.5, "sequential", None),
]


@functools.cache
def phase(objective, alpha_0, name):
    config = toy.config(objective, alpha_0, LENGTH, BLOCK)
    found = make_phases(config, toy.SPECIAL, low_variance=False)
    return next(phase for phase in found if phase.name == name)


def label(objective, alpha_0, name, lengths=(LENGTH,) * ROWS):
    """Labelled rows with that many real tokens."""
    x = np.random.default_rng(0).choice(toy.REAL, (len(lengths), LENGTH)).astype(np.int32)
    valid = np.arange(LENGTH) < np.array(lengths)[:, None]
    return phase(objective, alpha_0, name).label(jax.random.key(1), x, valid)


# Layouts.


@pytest.mark.parametrize(("objective", "alpha_0", "name", "layout"), PHASES, ids=str)
def test_layout_is_what_the_labels_are(objective, alpha_0, name, layout):
    tokens = label(objective, alpha_0, name).tokens
    assert tokens.layout == layout
    if layout is None:
        assert len(np.unique(tokens.rank, axis=0)) > 1  # every row has its own
        return
    rank, in_context = layout.labels(np.arange(tokens.rank.shape[1]))
    np.testing.assert_array_equal(tokens.rank, np.tile(rank, (ROWS, 1)))
    np.testing.assert_array_equal(tokens.in_context, np.tile(in_context, (ROWS, 1)))


@pytest.mark.parametrize(("objective", "alpha_0", "name", "layout"), PHASES[:5], ids=str)
def test_what_has_another_rank_than_the_layout_is_padding_that_nobody_reads(
    objective, alpha_0, name, layout
):
    lengths = np.array([16, 9, 1, 13])
    tokens = jax.tree.map(np.asarray, label(objective, alpha_0, name, tuple(lengths)).tokens)
    rank, in_context = (np.asarray(a) for a in layout.labels(np.arange(tokens.rank.shape[1])))
    np.testing.assert_array_equal(tokens.in_context, np.tile(in_context, (4, 1)))
    padding = tokens.position >= lengths[:, None]
    assert ((tokens.rank == rank) | padding).all()
    for row in range(4):
        if padding[row].any():
            last = tokens.rank[row][~padding[row]].max()
            assert (tokens.rank[row][padding[row]] > last).all()


def test_labels_of_fewer_queries_are_those_of_the_last():
    """By hand: two queries of five tokens, in blocks of two."""
    rank, in_context = Layout(5, 2, 2).labels(np.arange(7))
    np.testing.assert_array_equal(rank, [1, 2, 0, 0, 1, 1, 2])
    np.testing.assert_array_equal(in_context, [False] * 2 + [True] * 5)


# How many.


def binomial_tail(length, p, bound):
    """P(Binomial(length, p) > bound)."""
    return math.fsum(
        math.comb(length, k) * p**k * (1 - p) ** (length - k) for k in range(bound + 1, length + 1)
    )


@pytest.mark.parametrize(
    ("length", "masked_fraction", "rows", "multiple"),
    [
        (128, 0.5, 256, 8),
        (128, 0.875, 4, 8),
        (100, 0.3, 32, 12),
        (64, 0.02, 1, 8),
        (16, 0.5, 1000, 8),
        (8, 0.5, 2, 8),
        (128, 0.95, 256, 8),
    ],
)
def test_as_many_as_cost_the_fewest_tokens(length, masked_fraction, rows, multiple):
    tokens = {length: 2 * length}
    for bound in range(multiple, length, multiple):
        exceeded = 1 - (1 - binomial_tail(length, masked_fraction, bound)) ** rows
        np.testing.assert_allclose(
            trim.exceeded(length, masked_fraction, rows, bound), exceeded, rtol=1e-6, atol=1e-12
        )
        tokens[bound] = (1 - exceeded) * (length + bound) + exceeded * 2 * length
    found = trim.num_queries(length, masked_fraction, rows, multiple)
    assert found == length or found % multiple == 0
    assert tokens[found] <= min(tokens.values()) + 1e-9


def test_savings_of_a_large_batch():
    assert trim.num_queries(1024, 0.5, 256) <= 0.57 * 1024  # of 1024, 512 ± 16 are predicted


@pytest.mark.parametrize("rows", [1, 2, 256])
@pytest.mark.parametrize("masked_fraction", [1.0, 1 - 1e-9])
def test_all_are_kept_where_all_are_predicted(rows, masked_fraction):
    assert trim.num_queries(128, masked_fraction, rows) == 128


def test_on_a_gpu_whole_blocks_of_attention_are_kept(monkeypatch):
    """64 tokens of 1024 are not dear; of 128 they are."""
    phase = types.SimpleNamespace(can_trim_queries=True, masked_fraction=0.5)
    kept = functools.partial(trim.kept_queries, phase, rows=16, mesh=None)
    anywhere = kept(1024), kept(128), kept(1000)
    monkeypatch.setattr(sharding, "platform", lambda mesh: "gpu")
    assert (kept(1024), kept(128), kept(1000)) == (576, *anywhere[1:])
    assert anywhere == (560, 80, 552) and kept(64) == trim.num_queries(64, 0.5, 16)
    assert trim.BLOCK["gpu"] == flash.BLOCK_BYTES // jnp.dtype("bfloat16").itemsize
    halves = types.SimpleNamespace(shape={"sequence": 2})
    assert trim.kept_queries(phase, 2048, 16, halves) % 128 == 0  # each device has whole blocks


def test_how_often_a_batch_does_not_fit():
    draws = np.random.default_rng(0).binomial(64, 0.4, (40_000, 8)).max(axis=1)
    for bound in (26, 32, 38):
        wanted = trim.exceeded(64, 0.4, 8, bound)
        assert abs((draws > bound).mean() - wanted) < 4 * math.sqrt(wanted / 40_000) + 1e-4


# Trimmed batches.

MODEL = dataclasses.replace(toy.CONFIG, blocks=1, cond_width=0, attention="dense")
HEAD = Head.of(MODEL, toy.MASK, chunk=16)
PARAMS = {name: toy.PARAMS[name] for name in ("embedding", "final_norm", "logits")} | {
    "blocks": {
        name: jax.tree.map(lambda a: a[:1], layer)
        for name, layer in toy.PARAMS["blocks"].items()
        if name != "modulation"
    }
}
LENGTHS = (16, 16, 14, 16, 13, 16, 16, 15)  # padding at the end of rows


def most_needed(labelled):
    """How many of the last query copies hold all that is predicted, in each row."""
    return LENGTH - np.argmax(np.asarray(labelled.weight) != 0, axis=1)


@pytest.mark.parametrize("queries", [4, 8, 12])
def test_trimmed_layout_is_what_the_labels_are(queries):
    short = trim.trim(label("eso_b", 0.5, "sequential"), queries)
    assert short.tokens.layout == Layout(LENGTH, queries)
    rank, in_context = short.tokens.layout.labels(np.arange(LENGTH + queries))
    np.testing.assert_array_equal(short.tokens.rank, np.tile(rank, (ROWS, 1)))
    np.testing.assert_array_equal(short.tokens.in_context, np.tile(in_context, (ROWS, 1)))
    assert short.target.shape == short.weight.shape == (ROWS, queries)
    assert trim.trim(label("eso_a", 0.5, "sequential"), queries).tokens.layout is None


def test_fits_says_whether_a_prediction_would_be_lost():
    labelled = label("eso_b", 0.5, "sequential", LENGTHS)
    needed = most_needed(labelled).max()
    assert 4 < needed < LENGTH
    assert bool(trim.fits(labelled, needed)) and not bool(trim.fits(labelled, needed - 1))
    kept = trim.trim(labelled, needed)
    assert np.sum(kept.weight) == np.sum(labelled.weight)
    np.testing.assert_array_equal(kept.num_tokens, LENGTHS)


def test_trimming_changes_neither_losses_nor_gradients():
    """Of (A) and (B) in one pass; whether both fit or one of them must be run whole."""
    whole = phase_loss.PhaseLoss(model.bind(MODEL), HEAD, (None, None))
    trimmed = dataclasses.replace(whole, queries=(12, 12))
    run, run_trimmed = jax.jit(whole.loss_and_grads), jax.jit(trimmed.loss_and_grads)
    fits = []
    for alpha_0 in (0.6, 0.1):
        labelled = tuple(
            label(objective, alpha, "sequential", LENGTHS)
            for objective, alpha in (("eso_a", 0.6), ("eso_b", alpha_0))
        )
        fits.append([bool(trim.fits(part, 12)) for part in labelled])
        with compiling(fast=False):
            wanted, found = run(PARAMS, labelled), run_trimmed(PARAMS, labelled)
        np.testing.assert_allclose(found[0], wanted[0], rtol=2e-6)
        for a, b in zip(*map(jax.tree.leaves, (found[1], wanted[1])), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * np.abs(b).max())
    assert fits == [[True, True], [True, False]]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_that_does_not_fit_is_run_whole(accumulation):
    """Each micro-batch for itself. Seen through a model of which the loss says how many tokens
    it was given."""

    def apply(params, batches, *, predict, **kwargs):
        length = batches[0].token.shape[1]
        h = jnp.full((*batches[0].token.shape, 1), length, jnp.float32) * params["one"]
        return (h[:, : predict[0][1]],)

    params = {"one": jnp.ones(()), "logits": {"kernel": jnp.zeros((1, 4)).at[0, 0].set(1.0)}}
    objective = phase_loss.PhaseLoss(apply, HEAD, (8,), accumulation)
    weight = jnp.zeros((4, LENGTH)).at[:, -1].set(1)
    tail = label("eso_b", 0.5, "sequential", (LENGTH,) * 4).replace(
        weight=weight, target=jnp.full((4, LENGTH), 2)
    )
    # one more than there is room for, in the first half of the rows
    lost = tail.replace(weight=weight.at[0, LENGTH - 9].set(1))
    run = jax.jit(objective.loss_and_grads)

    def tokens(labelled):
        losses, _ = run(params, (labelled,))
        return float(losses[0]) * 4 * LENGTH / float(jnp.sum(labelled.weight))

    assert round(tokens(tail)) == LENGTH + 8
    wanted = 2 * LENGTH if accumulation == 1 else (3 * 2 * LENGTH + 2 * (LENGTH + 8)) / 5
    assert abs(tokens(lost) - wanted) < 0.01


def queries_of(objective, alpha_0, rows=64, length=64, **mesh):
    config = toy.config(objective, alpha_0, length)
    config.train.batch_size = rows
    config.mesh.update({"data": 1, "devices": 1} | mesh)
    mesh = sharding.make_mesh(config.mesh)
    built = types.SimpleNamespace(mesh=mesh, model=toy.CONFIG, apply=None, head=HEAD)
    phases = make_phases(config, toy.SPECIAL, low_variance=False)
    return phase_loss.make_objective(config, built, phases).queries


def test_only_sequential_phases_are_trimmed():
    assert queries_of("ar", 0.0) == queries_of("mdlm", 1.0) == queries_of("bd3", 1.0) == (None,)
    assert queries_of("eso_b", 0.0) == (None,)  # all are predicted
    for objective in ("eso_a", "eso_b"):
        kept = trim.num_queries(64, 0.5, 32)
        assert kept < 64
        assert queries_of(objective, 0.5) == (None, kept)


def test_trimmed_rows_divide_by_the_sequence_axis():
    _, kept = queries_of("eso_b", 0.9, length=96, sequence=3, devices=3)
    assert kept == trim.num_queries(96, 1 - 0.9, 32, 24)
