"""The one rule of attention, and its dense form."""

import jax
import jax.numpy as jnp

from esolm_jax.kv_cache import KVCache
from esolm_jax.labels import Tokens

MASKED = -1e30  # float32 scores vanish beside it


def visible(q_rank, q_in_context, k_rank, k_in_context):
    """Whether a query may read a key: the rule that every model of the family shares.

        rank_k + [not in_context_q] <= rank_q           if in_context_k
        not in_context_q  and  rank_k == rank_q         otherwise

    Args are integer ranks and boolean flags of broadcastable shapes; returns bool of the
    broadcast shape. Every token sees itself.
    """
    reads_context = k_rank <= q_rank - jnp.where(q_in_context, 0, 1)
    reads_query_copy = ~q_in_context & (k_rank == q_rank)
    return jnp.where(k_in_context, reads_context, reads_query_copy)


def dense_mask(q: Tokens, k: Tokens | KVCache) -> jax.Array:
    """The rule for all pairs: bool [B, Tq, Tk]."""
    return visible(
        q.rank[:, :, None], q.in_context[:, :, None], k.rank[:, None, :], k.in_context[:, None, :]
    )


def attend(q_BHTK, k_BHSK, v_BHSK, mask_BTS):
    """Softmax attention with scale 1/√K; scores and softmax in float32, head-major for the CPU.

    Returns [B, H, T, K] in the dtype of v. A masked key's score is lost in the bias and its
    probability is exactly zero, so what is invisible cannot reach the result even in the last bit.
    """
    bias_BTS = jnp.where(mask_BTS, 0.0, MASKED)
    q_BHTK = q_BHTK * q_BHTK.shape[-1] ** -0.5
    scores = jnp.einsum("bhtk,bhsk->bhts", q_BHTK, k_BHSK, preferred_element_type=jnp.float32)
    probs = jax.nn.softmax(scores + bias_BTS[:, None], axis=-1).astype(v_BHSK.dtype)
    return jnp.einsum("bhts,bhsk->bhtk", probs, v_BHSK)
