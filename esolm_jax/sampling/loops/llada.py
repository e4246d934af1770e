"""LLaDA's sampling: blocks from left to right; each pass reveals the most confident tokens of a
block, or random ones.

The masks of a block are shared out evenly among its steps. Masks of earlier blocks and inside the
prompt compete with them. A token is argmax l + T · Gumbel noise; its confidence is its probability
under the unperturbed logits.
"""

import dataclasses

import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.sampling.loops import reveal
from esolm_jax.sampling.loops.noise import PassNoise

ORDERS = ("confidence", "random")


@dataclasses.dataclass(frozen=True)
class LLaDA:
    """The rule of whole_text.Rule.

    Attributes:
      steps: of all blocks together; 0 = one token per step.
      block_length: tokens of a block, counted from the first token behind the prompt; 0 = all.
      order: one of ORDERS.
      temperature: T; 0 = greedy.
      guidance: see whole_text.Rule.
      never: ids that are not drawn.
      late: ids that are drawn, but have no confidence: they come last in their block.
    """

    steps: int = 0
    block_length: int = 0
    order: str = "confidence"
    temperature: float = 0.0
    guidance: float = 0.0
    never: tuple[int, ...] = ()
    late: tuple[int, ...] = ()

    def tables(self, known: np.ndarray, length: np.ndarray) -> dict[str, np.ndarray]:
        """`count` masks are revealed before the position `end`, int32 [passes, B]."""
        rows = [self._row(known[b, : length[b]], b) for b in range(len(known))]
        passes = max(len(counts) for counts, _ in rows)
        count, end = np.zeros((2, passes, len(known)), np.int32)
        for b, (counts, ends) in enumerate(rows):
            count[: len(counts), b], end[: len(ends), b] = counts, ends
        return {"count": count, "end": end}

    def _row(self, known: np.ndarray, row: int) -> tuple[list[int], list[int]]:
        behind = np.flatnonzero(known).max(initial=-1) + 1
        start = behind if behind < len(known) else int(np.argmin(known))  # nothing behind: infill
        block = self.block_length or max(1, len(known) - start)
        blocks = -(-(len(known) - start) // block)
        if self.steps % max(1, blocks):
            raise UserError(
                f"config.sample.steps={self.steps}: must be a multiple of the {blocks} blocks of "
                f"text {row}"
            )
        counts, ends = [], []
        for n in range(blocks):
            end = min(len(known), start + (n + 1) * block)
            masks = int((~known[start + n * block : end]).sum())
            steps = self.steps // blocks or masks
            counts += [masks // steps + (i < masks % steps) for i in range(steps)]
            ends += [end] * steps
        return counts, ends

    def choose(self, row: dict, logits_BLV, is_masked_BL, noise: PassNoise):
        """See whole_text.Rule."""
        logits = reveal.without(logits_BLV, self.never)
        perturbed = self.temperature * noise.tokens() if self.temperature else None
        token, score, _ = reveal.draw(logits, perturbed)
        if self.order == "random":
            score = noise.log_uniform()
        elif self.late:
            probs = reveal.probabilities(reveal.without(logits, self.late))
            score = reveal.probability(probs, token)
        allowed = is_masked_BL & (noise.position_BW < row["end"][:, None])
        return token, reveal.best(score, allowed, row["count"])
