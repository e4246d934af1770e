"""The cheap generator of dropout: its bits are fair and independent, as far as dropout can tell."""

import jax
import numpy as np
import pytest

from esolm_jax.process import prng

SHAPE = (8, 64, 96)
COUNT = np.prod(SHAPE)
SIGMAS = 5


def bits(seed=0, shape=SHAPE):
    return np.asarray(prng.mix32(prng.key(seed), shape))


def is_fair(flips):
    """Whether a bool array is True in half of the cases, to SIGMAS standard errors."""
    return abs(flips.mean() - 0.5) < SIGMAS * 0.5 / np.sqrt(flips.size)


@pytest.mark.parametrize("bit", range(0, 32, 3))
def test_each_bit_is_fair(bit):
    assert is_fair((bits() >> bit) & 1 == 1)


def test_share_below_a_threshold():
    for rate in (0.01, 0.1, 0.5):
        share = np.mean(bits() < round(rate * 2**32))
        assert abs(share - rate) < SIGMAS * np.sqrt(rate * (1 - rate) / COUNT)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("distance", [1, 2, 7])
def test_neighbours_are_independent(axis, distance):
    top = bits() >> 31
    moved = np.roll(top, distance, axis)
    assert is_fair(top == moved)


@pytest.mark.parametrize("other", [1, 2, 2**31])
def test_keys_are_independent(other):
    assert is_fair(bits() >> 31 == bits(other) >> 31)
    split = jax.random.split(prng.key(0))
    a, b = (np.asarray(prng.mix32(key, SHAPE)) for key in split)
    assert is_fair(a >> 31 == b >> 31)


def test_all_values_of_a_row_differ():
    """A row's values are a bijection of the index: none comes twice."""
    assert all(len(np.unique(row)) == row.size for row in bits())


def test_a_value_depends_on_its_row_and_index_only():
    """So the bits are the same on every mesh, and for more rows."""
    assert (bits(shape=(16, *SHAPE[1:]))[:8] == bits()).all()
