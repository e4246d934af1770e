"""Dream's sampling: the text has no blocks; each pass reveals a share of all masks.

At time t, which falls linearly from 1 to ε, a step to s reveals int(M (1 − s/t)) of M masks: the
most confident ones by `order`, or each mask with probability 1 − s/t if the order is random; the
last step reveals all. Confidence is of the distribution that tokens are drawn from: logits at the
temperature, then top-p, then top-k. M is each row's own; the published code takes the mean over a
batch, and so overwrites visible tokens of rows that have fewer masks.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from esolm_jax.sampling.engine.choose import at_temperature, keep_top_k, top_p_filter
from esolm_jax.sampling.loops import reveal
from esolm_jax.sampling.loops.noise import PassNoise

ORDERS = ("confidence", "margin", "entropy", "random")


@dataclasses.dataclass(frozen=True)
class Dream:
    """The rule of whole_text.Rule.

    Attributes:
      steps: 0 = as many as there are masks.
      order: one of ORDERS.
      order_temperature: above 0, the positions are drawn in proportion to exp(confidence / it).
      temperature: of tokens; 0 = greedy. top_p: 1 = off. top_k: 0 = off.
      eps: ε, the last time.
    """

    steps: int = 0
    order: str = "confidence"
    order_temperature: float = 0.0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    eps: float = 1e-3
    guidance: float = 0.0

    def tables(self, known: np.ndarray, length: np.ndarray) -> dict[str, np.ndarray]:
        """`fraction` of the masks that each pass reveals, float32 [passes, B]."""
        masks = length - known.sum(axis=1)
        fractions = [self._fractions(self.steps or max(1, int(m))) for m in masks]
        table = np.zeros((max(map(len, fractions)), len(known)), np.float32)
        for b, fraction in enumerate(fractions):
            table[: len(fraction), b] = fraction
        return {"fraction": table}

    def _fractions(self, steps: int) -> np.ndarray:
        t = np.linspace(1, self.eps, steps + 1, dtype=np.float32)
        return np.append(1 - t[1:-1] / t[:-2], np.float32(1))

    def choose(self, row: dict, logits_BLV, is_masked_BL, noise: PassNoise):
        """See whole_text.Rule."""
        logits = self._filtered(logits_BLV)
        token, score, probs = reveal.draw(logits, noise.tokens() if self.temperature else None)
        fraction = row["fraction"][:, None]
        if self.order == "random":
            return token, noise.log_uniform() < jnp.log(fraction)
        if self.order == "margin":
            score = reveal.margin(probs)
        elif self.order == "entropy":
            score = reveal.negative_entropy(probs)
        if self.order_temperature:
            score = score / self.order_temperature + noise.gumbel()
        masks = jnp.sum(is_masked_BL, axis=1)
        count = jnp.floor(masks.astype(jnp.float32) * row["fraction"]).astype(jnp.int32)
        return token, reveal.best(score, is_masked_BL, count)

    def _filtered(self, logits):
        if self.temperature:
            logits = at_temperature(logits, self.temperature)
        if self.top_p < 1:
            logits = top_p_filter(logits, self.top_p)
        return keep_top_k(logits, self.top_k) if self.top_k else logits
