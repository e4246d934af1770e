"""Reference attention, which materializes the scores of all pairs."""

import jax
import jax.numpy as jnp

MASKED = -1e30  # absorbs any float32 score that is added to it


def dense(q_BHTK, k_BGSK, v_BGSK, mask_BTS):
    """Softmax attention under a mask, bool [B, T, S]. Head-major: fast on a CPU."""
    batch, heads, length, width = q_BHTK.shape
    groups = k_BGSK.shape[1]
    bias_BTS = jnp.where(mask_BTS, 0.0, MASKED)
    q_BGRK = (q_BHTK * width**-0.5).reshape(batch, groups, -1, width)  # R = heads of a group × T
    scores = jnp.einsum("bgrk,bgsk->bgrs", q_BGRK, k_BGSK, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, heads, length, -1) + bias_BTS[:, None]
    probs = jax.nn.softmax(scores, axis=-1).astype(v_BGSK.dtype)
    probs = probs.reshape(batch, groups, -1, probs.shape[-1])
    out_BGRK = jnp.einsum("bgrs,bgsk->bgrk", probs, v_BGSK, preferred_element_type=jnp.float32)
    return out_BGRK.reshape(q_BHTK.shape).astype(v_BGSK.dtype)
