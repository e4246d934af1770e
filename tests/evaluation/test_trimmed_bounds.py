"""Bounds without the query copies that reach no loss equal those with all of them."""

import jax
import numpy as np
import pytest
import toy

from esolm_jax.evaluation import likelihood, window_noise
from esolm_jax.evaluation.report import window_sums
from esolm_jax.family import trim
from esolm_jax.process import prng

pytestmark = pytest.mark.fast_compile
LENGTH, ROWS, SEED = 64, 4, 1
X = np.random.default_rng(0).choice(toy.REAL, (ROWS, LENGTH)).astype(np.int32)
WHOLE = np.ones(X.shape, bool)
SHORT = WHOLE & (np.arange(LENGTH) < 20)[None]  # padding follows the predicted tokens
CONFIG = toy.config("eso_b", 0.5, LENGTH)


def sequential():
    return likelihood.bound_phases(CONFIG, toy.SPECIAL)[1]


def bounds():
    """Nats of the windows of a batch that fits the trimmed pass and of one that does not."""
    settings, found = {"num_samples": 1, "seed": SEED}, []
    for make in (likelihood.make_nelbo, window_noise.make_nelbo):
        estimate = make(CONFIG, toy.BUILT)
        for valid in (WHOLE, SHORT):
            one = estimate(toy.PARAMS, [{"x": X, "valid": valid}], **settings)
            found.append(one.window_nll)
    collect = window_sums.make(CONFIG, toy.BUILT)
    sums = collect(toy.PARAMS, [{"x": X, "valid": WHOLE}], windows=ROWS, **settings)
    return np.array(found), sums


def test_trimming_changes_no_bound(monkeypatch):
    queries = likelihood.kept_queries(sequential(), ROWS, LENGTH, None)
    assert LENGTH / 2 < queries < LENGTH
    (key,) = jax.random.split(jax.random.fold_in(prng.key(SEED), 0), 1)
    labels = [sequential().label(jax.random.fold_in(key, 1), X, v) for v in (WHOLE, SHORT)]
    assert [bool(trim.fits(one, queries)) for one in labels] == [True, False]
    trimmed, sums = bounds()
    monkeypatch.setattr(trim, "kept_queries", lambda *args: None)
    whole, wanted = bounds()
    np.testing.assert_allclose(trimmed, whole, rtol=1e-5)
    np.testing.assert_allclose(sums.positions, wanted.positions, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sums.cells, wanted.cells, rtol=1e-4, atol=1e-4)


def test_padded_windows_are_not_trimmed():
    config = toy.config("eso_b", 0.5, LENGTH)
    config.data.packing = "pad"
    phases = likelihood.bound_phases(config, toy.SPECIAL)
    assert [likelihood.kept_queries(p, ROWS, LENGTH, None) for p in phases] == [None, None]
