"""Attention by the rule in linear memory, in plain XLA, for any labels on any device."""

import jax.numpy as jnp

from esolm_jax.attention import _dense, visible


def lean(q_BHTK, k_BGSK, v_BGSK, q_rank, q_in_context, k_rank, k_in_context, *, layout=None):
    """See attention.attend."""
    mask = visible(
        q_rank[:, :, None], q_in_context[:, :, None], k_rank[:, None], k_in_context[:, None]
    )
    return _dense(q_BHTK, k_BGSK, v_BGSK, jnp.asarray(mask))
