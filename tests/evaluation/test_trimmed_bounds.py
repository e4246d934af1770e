"""Bounds without the query copies that reach no loss equal those with all of them."""

import functools

import jax
import numpy as np
import toy

from esolm_jax.evaluation import likelihood
from esolm_jax.evaluation.report import window_sums
from esolm_jax.family import eso_b, trim

LENGTH, ROWS = 64, 4
CONFIG = toy.config("eso_b", 0.5, LENGTH)
BUILT, PARAMS = toy.lookup_model(LENGTH)


def sequential(config=CONFIG):
    return likelihood.bound_phases(config, toy.SPECIAL)[1]


def labelled(num_real):
    """The sequential phase of rows with `num_real` real tokens."""
    rng = np.random.default_rng(0)
    x = rng.choice(toy.REAL, (ROWS, LENGTH)).astype(np.int32)
    valid = np.broadcast_to(np.arange(LENGTH) < num_real, x.shape)
    masked = valid & (rng.random(x.shape) < 0.5)
    group = np.where(valid, masked, 2)
    order = np.argsort(group, axis=1, kind="stable").astype(np.int32)
    return eso_b.label_sequential(x, valid, masked, order, masked, mask=toy.MASK)


def test_trimming_changes_no_bound_and_no_sum_of_a_report():
    """Of a batch that fits the trimmed pass, and of one with padding, which does not."""
    queries = trim.kept_queries(sequential(), LENGTH, ROWS, None)
    assert LENGTH / 2 < queries < LENGTH
    batches = [labelled(LENGTH), labelled(20)]
    assert [bool(trim.fits(one, queries)) for one in batches] == [True, False]
    nll = functools.partial(likelihood.labelled_nll, BUILT.apply, BUILT.head, PARAMS)
    draw = window_sums.Draw.of(CONFIG, BUILT)
    sums = functools.partial(draw.phase_sums, PARAMS, False, 4)

    def run(one):
        return nll(one), *sums(one)

    trimmed = jax.jit(lambda one: likelihood.on_kept_queries(run, sequential(), one, None))
    whole = jax.jit(run)
    for one in batches:
        for found, wanted in zip(trimmed(one), whole(one), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
            assert np.asarray(wanted).sum() > 0


def test_padded_windows_are_not_trimmed():
    config = toy.config("eso_b", 0.5, LENGTH)
    config.data.packing = "pad"
    assert trim.kept_queries(sequential(config), LENGTH, ROWS, None) is None
