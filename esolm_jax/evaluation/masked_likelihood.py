"""Likelihoods of answers by the protocols of LLaDA and Dream, as labels of their families.

Both protocols mask a part of the tokens and weight the cross-entropy of each masked token:
−log p ≈ mean over draws of Σ weight · (−log p of the token). LLaDA masks exactly l of the N tokens
of an answer, l about uniform on 1..N, with weight N/l. Dream masks each of them with probability p,
with weight 1/p. The mask token keeps its probability, unlike in this package's own bounds.
"""

import dataclasses
import math

import jax
import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.evaluation.likelihood import labelled_nll
from esolm_jax.evaluation.protocol import multiple_choice
from esolm_jax.family import mdlm, mdlm_shifted, registry
from esolm_jax.family.family import whole_text
from esolm_jax.model.build import BuiltModel
from esolm_jax.parallel import sharding

DREAM_EPS = 1e-3  # the least p
_NO_TOKEN = -1
_LENGTHS = 32  # texts are padded to a multiple, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Draws:
    """Masks of one text of n tokens.

    Attributes:
      masked: bool [draws, n]. weight: float32 [draws, n], of masked tokens; 0 elsewhere.
    """

    masked: np.ndarray
    weight: np.ndarray


def llada_draws(rng: np.random.Generator, prompt: int, answer: int, draws: int, rows: int) -> Draws:
    """Masks over an answer of `answer` tokens behind `prompt` tokens, stratified in batches of
    `rows` draws, which must divide `draws`."""
    of_answer = multiple_choice.draw_masks(rng, answer, draws, rows)
    masked = np.pad(of_answer, ((0, 0), (prompt, 0)))
    weight = masked * (answer / masked.sum(axis=1, keepdims=True))
    return Draws(masked, weight.astype(np.float32))


def dream_draws(rng: np.random.Generator, prompt: int, answer: int, draws: int, rows: int) -> Draws:
    """As llada_draws. The first and the last token of the text are never masked."""
    start = rng.random((draws // rows, 1))
    t = (start + np.arange(rows)[None] / rows) % 1
    p = ((1 - DREAM_EPS) * t + DREAM_EPS).reshape(-1, 1)
    position = np.arange(prompt + answer)
    may = (position >= max(1, prompt)) & (position < prompt + answer - 1)
    masked = (rng.random((draws, len(position))) < p) & may[None]
    return Draws(masked, (masked / p).astype(np.float32))


class MaskedLikelihood:
    """Log-likelihoods of answers under a model of objective mdlm or mdlm_shifted.

    UserError: the model is of another family.
    """

    def __init__(self, objective: str, built: BuiltModel, rows: int):
        """`rows`: texts of a forward pass, a multiple of the row shards of the mesh."""
        family = registry.get(objective)
        if family.rank_span is not whole_text:
            raise UserError(
                f"config.objective={objective!r}: must be mdlm or mdlm_shifted for --answers, "
                "because the protocols of LLaDA and Dream mask a text that is read as a whole"
            )
        self.is_shifted = family.predicts_next
        self.draws = dream_draws if self.is_shifted else llada_draws
        self._built, self._rows = built, rows
        self._nll = jax.jit(self._labelled_nll)

    def _labelled_nll(self, params, batch):
        label = mdlm_shifted.label if self.is_shifted else mdlm.label
        labelled = label(**batch, mask=self._built.special.mask)
        head = dataclasses.replace(self._built.head, mask_id=_NO_TOKEN)
        return labelled_nll(self._built.apply, head, params, labelled)

    def nll(self, params: dict, ids: list[int], draws: Draws) -> np.ndarray:
        """Σ weight · (−log p) of each draw: float64 [draws]."""
        count, length = draws.masked.shape
        width = _LENGTHS * math.ceil(length / _LENGTHS)
        size = self._rows * math.ceil(count / self._rows)
        whole = {
            "x": np.tile(np.array(ids, np.int32), (size, 1)),
            "valid": np.ones((size, length), bool),
            "masked": np.pad(draws.masked, ((0, size - count), (0, 0))),
            "weight": np.pad(draws.weight, ((0, size - count), (0, 0))),
        }
        whole = {name: np.pad(a, ((0, 0), (0, width - length))) for name, a in whole.items()}
        found = []
        for start in range(0, size, self._rows):
            part = {name: a[start : start + self._rows] for name, a in whole.items()}
            batch = sharding.put_batch(part, self._built.mesh, self._rows)
            found.append(np.asarray(self._nll(params, batch), np.float64))
        return np.concatenate(found)[:count]

    def log_likelihood(
        self, params: dict, prompt: list[int], answer: list[int], *, seed: int, draws: int
    ) -> float:
        """The estimate of log p(answer | prompt) in nats, from `draws` draws."""
        rng = np.random.default_rng(seed)
        rows = math.gcd(draws, self._rows)
        drawn = self.draws(rng, len(prompt), len(answer), draws, rows)
        return -float(self.nll(params, [*prompt, *answer], drawn).mean())
