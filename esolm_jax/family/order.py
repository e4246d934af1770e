"""Generation orders σ: the text position that is generated at each rank. order[b, r] = position.

Padding comes last, so by the rule of attention no real token reads it.
"""

import jax
import jax.numpy as jnp


def _sort_by(group_BL, key_BL):
    """Positions sorted by group, then by key (stable), int32 [B, L]."""
    return jnp.lexsort((key_BL, group_BL), axis=-1).astype(jnp.int32)


def _groups(masked_BL, valid_BL):
    return jnp.where(valid_BL, jnp.where(masked_BL, 1, 0), 2)


def clean_first_random(key, masked_BL, valid_BL):
    """Clean tokens in random order, then masked ones in random order: the diffusion phase."""
    return _sort_by(_groups(masked_BL, valid_BL), jax.random.uniform(key, masked_BL.shape))


def clean_first_then_left_to_right(key, masked_BL, valid_BL):
    """Clean tokens in random order, then masked ones left to right: the sequential phase.

    With masked_BL drawn at probability 1 − α₀ this *is* the any-order distribution of the model:
    n ~ Binomial(L, α₀) uniformly chosen positions in random order, the rest sorted.
    """
    shuffled = jax.random.uniform(key, masked_BL.shape)
    left_to_right = jnp.arange(masked_BL.shape[1], dtype=jnp.float32)
    return _sort_by(_groups(masked_BL, valid_BL), jnp.where(masked_BL, left_to_right, shuffled))


def clean_first_natural(masked_BL, valid_BL):
    """Clean tokens left to right, then masked ones left to right."""
    natural = jnp.broadcast_to(jnp.arange(masked_BL.shape[1]), masked_BL.shape)
    return _sort_by(_groups(masked_BL, valid_BL), natural)
