"""The rule of attention: which tokens a token reads, as a function of their labels."""

import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.family.labels import Layout, Tokens


def visible(q_rank, q_in_context, k_rank, k_in_context):
    """Whether a query may read a key: the rule of all families.

        rank_k + [not in_context_q] <= rank_q           if in_context_k
        not in_context_q  and  rank_k == rank_q         otherwise

    Args are integer ranks and boolean flags of broadcastable shapes; returns bool of the
    broadcast shape. Every token sees itself.
    """
    reads_context = k_rank <= q_rank - jnp.where(q_in_context, 0, 1)
    reads_query_copy = ~q_in_context & (k_rank == q_rank)
    # No jnp.where, which TPU kernels cannot compile for booleans.
    return (k_in_context & reads_context) | (~k_in_context & reads_query_copy)


def comparisons(q_rank, q_in_context, k_rank, k_in_context):
    """The labels as int32 (q_reads, q_copy, k_context, k_copy), for kernels: a query sees a key if
    k_context <= q_reads or k_copy == q_copy. Ranks are above the two least integers; a query of the
    largest one, which is padding, sees all query copies."""
    least, largest = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max
    labels = (
        q_rank - jnp.where(q_in_context, 0, 1),
        jnp.where(q_in_context, least + 1, q_rank),
        jnp.where(k_in_context, k_rank, largest),
        jnp.where(k_in_context, least, k_rank),
    )
    return tuple(label.astype(jnp.int32) for label in labels)


def dense_mask(q: Tokens, k: Tokens) -> jax.Array:
    """The rule for all pairs: bool [B, Tq, Tk]. Uses ranks and contexts."""
    return visible(
        q.rank[:, :, None], q.in_context[:, :, None], k.rank[:, None, :], k.in_context[:, None, :]
    )


def layout_mask(layout: Layout, q_index: np.ndarray, k_index: np.ndarray) -> np.ndarray:
    """The rule between tokens of these indices in a layout, at trace time: bool [Tq, Tk]."""
    with jax.ensure_compile_time_eval():
        q_rank, q_in_context = (label[:, None] for label in layout.labels(q_index))
        return np.asarray(visible(q_rank, q_in_context, *layout.labels(k_index[None])))
