"""Sums over rows in one pass, as on GPUs, against the plain ones."""

import jax
import numpy as np
import pytest

from esolm_jax.model import row_sums


def logits(rows=6, columns=300):
    z = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32) * 10
    z[:, 7] = -np.inf  # the mask token
    z[1] += 1e4
    z[2] -= 1e4
    z[3, 10:] = -np.inf
    z[4, np.arange(columns) != 99] = -np.inf
    z[5] = np.sort(z[5])  # a larger one in every step
    return z


def test_softmax_statistics():
    z = logits()
    other = np.random.default_rng(1).normal(size=z.shape).astype(np.float32)
    cpu, gpu = (
        jax.jit(lambda z, p=p: row_sums.softmax_statistics(z, other, p))(z) for p in ("cpu", "gpu")
    )
    exact = np.exp(z.astype(np.float64) - z.max(axis=1, keepdims=True)).sum(axis=1)
    for top, total, summed in cpu, gpu:
        np.testing.assert_array_equal(top, z.max(axis=1))
        np.testing.assert_allclose(total, exact, rtol=1e-5)
        np.testing.assert_allclose(summed, other.astype(np.float64).sum(axis=1), rtol=1e-4)


def test_softmax_of_what_is_not_a_number():
    """A diverged run is noticed by its loss."""
    z = logits()
    z[0, 200] = np.nan
    for platform in "cpu", "gpu":
        _, total, _ = jax.jit(lambda z, p=platform: row_sums.softmax_statistics(z, z, p))(z)
        assert np.isnan(total[0]) and np.isfinite(total[1:]).all()


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_sum_rows(platform):
    a, b = np.random.default_rng(0).normal(size=(2, 5, 40)).astype(np.float32)
    found = jax.jit(lambda a, b: row_sums.sum_rows(a, b, platform=platform))(a, b)
    np.testing.assert_allclose(found, [a.sum(axis=1), b.sum(axis=1)], rtol=1e-5)
