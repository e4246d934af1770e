"""The shifted family: a token is predicted by the row of the token before it."""

import jax.numpy as jnp
import numpy as np

from esolm_jax.family import mdlm, mdlm_shifted


def test_targets_are_those_of_the_next_token():
    """By hand: rows 0..3 predict the tokens 1..4; token 0 is given though it was drawn."""
    x = jnp.array([[5, 6, 7, 8, 9]])
    masked = jnp.array([[True, True, False, True, False]])
    weight = jnp.where(masked, 2.0, 0.0)
    labelled = mdlm_shifted.label(x, jnp.ones_like(masked), masked, weight, mask=0)
    assert labelled.tokens.token.tolist() == [[5, 0, 7, 0, 9]]
    assert labelled.tokens.position.tolist() == [[0, 1, 2, 3, 4]]
    assert labelled.weight.tolist() == [[2, 0, 2, 0, 0]]
    predicted = np.asarray(labelled.weight) > 0
    assert np.asarray(labelled.target)[predicted].tolist() == [6, 8]


def test_other_labels_are_those_of_mdlm():
    x, valid = jnp.array([[5, 6, 7, 8]]), jnp.array([[True, True, True, False]])
    masked = jnp.array([[False, True, True, False]])
    shifted, plain = (
        family.label(x, valid, masked, masked, mask=0).tokens for family in (mdlm_shifted, mdlm)
    )
    for name in ("token", "position", "rank", "in_context"):
        np.testing.assert_array_equal(getattr(shifted, name), getattr(plain, name))
