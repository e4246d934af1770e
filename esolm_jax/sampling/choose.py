"""From logits to tokens: temperature, nucleus, and a draw that is right in the tails."""

import dataclasses

import jax
import jax.numpy as jnp

from esolm_jax.loss import exclude_mask_token


def nucleus(logits_BPV, top_p: float):
    """Keeps the smallest set of tokens whose probability reaches `top_p`; −∞ elsewhere.

    The likeliest token is always kept. Returns float32 of the same shape.
    """
    order = jnp.argsort(-logits_BPV, axis=-1)
    probs = jnp.take_along_axis(jax.nn.softmax(logits_BPV, axis=-1), order, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept_sorted = (before < top_p).at[..., 0].set(True)
    kept = jnp.take_along_axis(kept_sorted, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits_BPV, -jnp.inf)


def keep_top_k(logits_BPV, top_k: int):
    """Keeps the `top_k` likeliest tokens (and ties of the last); −∞ elsewhere."""
    top_k = min(top_k, logits_BPV.shape[-1])
    kth = jax.lax.top_k(logits_BPV, top_k)[0][..., -1:]
    return jnp.where(logits_BPV >= kth, logits_BPV, -jnp.inf)


def gumbel(row_keys_B, position_BP, vocab_size: int):
    """Standard Gumbel noise float32 [B, P, V], keyed by row and text position alone, so that a
    token's draw depends neither on its neighbours in the batch nor on the schedule.

    `mode='high'`: plain float32 noise cuts the tails off, which lowers the temperature unseen.
    """

    def one(row_key, position):
        key = jax.random.fold_in(row_key, position)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32, mode="high")

    return jax.vmap(jax.vmap(one, (None, 0)))(row_keys_B, position_BP)


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a token is chosen; hashable, so it is a static argument of the jitted loop.

    Attributes:
      mask_id: never chosen.
      temperature: 0 = greedy.
      top_p: nucleus, in (0, 1]; 1 = off.
      top_k: 0 = off. Applied before the nucleus.
    """

    mask_id: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __call__(self, logits_BPV, position_BP, row_keys_B):
        """int32 [B, P]: argmax(nucleus(logits / temperature) + Gumbel noise)."""
        logits_BPV = exclude_mask_token(logits_BPV, self.mask_id)
        if self.temperature == 0:
            return jnp.argmax(logits_BPV, axis=-1).astype(jnp.int32)
        logits_BPV = logits_BPV / self.temperature
        if self.top_k:
            logits_BPV = keep_top_k(logits_BPV, self.top_k)
        if self.top_p < 1:
            logits_BPV = nucleus(logits_BPV, self.top_p)
        noise = self.noise(row_keys_B, position_BP, logits_BPV.shape[-1])
        return jnp.argmax(logits_BPV + noise, axis=-1).astype(jnp.int32)

    def noise(self, row_keys_B, position_BP, vocab_size):
        return gumbel(row_keys_B, position_BP, vocab_size)
