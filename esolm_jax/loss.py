"""The loss of every objective: weighted cross-entropy of the predicted tokens."""

import jax
import jax.numpy as jnp

from esolm_jax.labels import Labelled


def exclude_mask_token(logits_BPV, mask_id: int):
    """float32 logits with −∞ for the mask token: it is an input, never a prediction."""
    is_mask_V = jnp.arange(logits_BPV.shape[-1]) == mask_id
    return jnp.where(is_mask_V[None, None], -jnp.inf, logits_BPV.astype(jnp.float32))


def token_nll(logits_BPV, target_BP, mask_id: int):
    """−log p(target), float32 [B, P] in nats. Targets are never the mask token."""
    logits_BPV = exclude_mask_token(logits_BPV, mask_id)
    target_logit = jnp.take_along_axis(logits_BPV, target_BP[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BPV, axis=-1) - target_logit


def sequence_nll(logits_BPV, labelled: Labelled, mask_id: int):
    """Σ over a row's tokens of weight · (−log p(target)): float32 [B] in nats."""
    nll_BP = token_nll(logits_BPV, labelled.target, mask_id)
    return jnp.sum(labelled.weight * nll_BP, axis=-1)
