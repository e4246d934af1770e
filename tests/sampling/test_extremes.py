"""Temperatures and logits at the ends of what float32 holds: the mask is never drawn, and the
limits are the greedy choice and the uniform one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from esolm_jax.interop.export import exported_sampler
from esolm_jax.sampling.engine import choose
from esolm_jax.sampling.engine.choose import TokenSampler, argmax, at_temperature, gumbel, keys_of

KEY = jax.random.key(0)
SMALL, LARGE = (1e-3, 1e-20, 1e-37, 1e-40, 1e-45, 1e-300), (1e30, 1e37, 1e39, 1e300)
LOGITS = [30.0, 31.0, 29.9, -80.0, 45.0, 30.001]
EXTREMES = {
    "ordinary": LOGITS,
    "close": [40.0, 40.00001, 39.9999, 40.0, 45.0, 40.00001 - 1e-5],
    "far": [3e38, 3.1e38, -3e38, 0.0, 3.3e38, 1e-38],
}


def draws(choice, logits, count=600):
    position = jnp.zeros((count, 1), jnp.int32)
    noise = gumbel(keys_of(jax.random.split(KEY, count), position), len(logits))
    tiled = jnp.tile(jnp.asarray(logits, jnp.float32), (count, 1, 1))
    return np.asarray(choice(tiled, position, noise))[:, 0]


def exported(temperature, mask_id, **filters):
    """The choice of a StableHLO sampler, whose temperature is a float32 input."""

    def choose(logits, position, noise):
        del noise
        keys = jax.random.split(KEY, len(logits))
        with np.errstate(over="ignore"):
            given = jnp.float32(np.float32(temperature))
        off = jnp.int32(filters.get("top_k", 0)), jnp.float32(filters.get("top_p", 1.0))
        settings = {"temperature": given, "filters": off, "mask_id": mask_id}
        return exported_sampler._pick(logits, position, row_keys=keys, **settings)

    return choose


@pytest.mark.parametrize("make", [lambda t, m: TokenSampler(m, temperature=t), exported])
@pytest.mark.parametrize("temperature", SMALL)
@pytest.mark.parametrize("name", EXTREMES)
def test_the_limit_of_small_temperatures_is_greedy(make, temperature, name):
    logits, mask_id = EXTREMES[name], 4
    if name == "close" and temperature > 1e-10:
        pytest.skip("the logits lie closer together than the temperature")
    (best,) = set(draws(TokenSampler(mask_id, temperature=0), logits, 2))
    assert set(draws(make(temperature, mask_id), logits)) == {best} == {1}


@pytest.mark.parametrize("make", [lambda t, m: TokenSampler(m, temperature=t), exported])
@pytest.mark.parametrize("temperature", [*LARGE, float("inf")])
@pytest.mark.parametrize("mask_id", [1, 4, 5])
def test_the_limit_of_large_temperatures_is_uniform_and_has_no_mask(make, temperature, mask_id):
    found = np.bincount(draws(make(temperature, mask_id), LOGITS), minlength=6)
    assert found[mask_id] == 0
    others = np.delete(found, mask_id)
    assert toy.p_value(others, np.full(5, 0.2)) > 1e-4


@pytest.mark.parametrize("temperature", [*SMALL, *LARGE, 0.0, 1.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 6, "top_p": 1e-9}])
def test_what_is_drawn_from_has_no_mask_and_sums_to_one(temperature, filters):
    for mask_id in range(6):
        choice = TokenSampler(mask_id, temperature=temperature, **filters)
        log_p = np.asarray(choice.log_probs(jnp.asarray(LOGITS, jnp.float32)[None, None]))[0, 0]
        assert log_p[mask_id] == -np.inf and not np.isnan(log_p).any()
        np.testing.assert_allclose(np.exp(log_p.astype(np.float64)).sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("logits", [[np.nan] * 4, [0, np.nan, 1, 2], [-np.inf] * 4, [np.inf] * 4])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"temperature": 1e-40}, {"top_p": 0.5},
                                     {"top_k": 2}])  # fmt: skip
@pytest.mark.parametrize("mask_id", range(4))
def test_the_mask_is_not_chosen_from_broken_logits(logits, options, mask_id):
    choice = TokenSampler(mask_id, **options)
    drawn = set(draws(choice, logits, 50))
    assert mask_id not in drawn and drawn <= set(range(4))
    log_p = choice.log_probs(jnp.asarray(logits, jnp.float32)[None, None])
    assert int(argmax(log_p, mask_id)[0, 0]) != mask_id  # as speculation draws


def test_ordinary_temperatures_divide_and_nothing_else():
    logits = jax.random.normal(KEY, (2, 3, 50)) * 20
    for temperature in (0.01, 0.3, 0.7, 1.0, 1.7, 100.0):
        want = np.asarray(logits / temperature)
        np.testing.assert_array_equal(at_temperature(logits, temperature), want)
        given = jnp.float32(temperature)
        np.testing.assert_array_equal(at_temperature(logits, given), logits / given)


@pytest.mark.parametrize("mask_id", [0, 4])
def test_the_largest_by_one_reduction_is_that_by_two(mask_id):
    """With ties and infinities, without the mask; never the mask, even if all are NaN."""
    rng = np.random.default_rng(0)
    x = rng.choice([-np.inf, -1.0, 0.0, 2.0, np.inf], (40, 5, 5)).astype(np.float32)
    x[0], x[1] = -np.inf, 1.0
    x[..., mask_id] = -np.inf
    ways = choose._argmax, choose._argmax_at_once
    in_turn, at_once = (way(x, mask_id) for way in ways)
    np.testing.assert_array_equal(at_once, in_turn)
    nothing = jnp.full((1, 1, 5), jnp.nan)
    assert mask_id not in [int(way(nothing, mask_id)[0, 0]) for way in ways]
