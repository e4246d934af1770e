"""Monte-Carlo scores of a prompt and an answer, by the names of the harnesses that publish them.

llada        LLaDA's: l of the N tokens of the answer are masked, l about uniform; 128 draws
duo_full     Duo's: any token of BOS, prompt, answer, EOS is masked; a mean per token of all of
             them; 1,024 draws
duo_suffix   Duo's: the prompt is restored, and answer and EOS are scored; NaN if a draw masks
             nothing, as published; 1,024 draws

The sums are those of evaluation/protocol/multiple_choice.py. Masks follow from a seed and the ids
of the pair, so a score does not depend on the other pairs. Scores of different protocols, and exact
ones, cannot be compared.
"""

import dataclasses
import zlib
from collections.abc import Callable

import numpy as np

from esolm_jax.evaluation.answer_likelihood import Pair
from esolm_jax.evaluation.protocol import multiple_choice as mc
from esolm_jax.family.noise import EPS
from esolm_jax.language_model import LanguageModel

STRATIFIED = 32  # draws of LLaDA that are stratified together


@dataclasses.dataclass(frozen=True)
class MonteCarlo:
    """Settings of the draws.

    Attributes:
      vocab_size: ids of the logits. batch_size: rows of a forward pass.
      draws: masks of each pair; 0 = as published.
      cfg: strength of LLaDA's classifier-free guidance.
    """

    model: LanguageModel
    vocab_size: int
    batch_size: int
    draws: int = 0
    seed: int = 0
    cfg: float = 0.0

    def logits_of(self, ids: np.ndarray) -> np.ndarray:
        """Logits float64 [n, T, V] of rows with masks, the mask token excluded; zeros of rows
        without a mask, which predict nothing."""
        mask_id, size = self.model.mask_id, self.batch_size
        (rows,) = np.nonzero((ids == mask_id).any(axis=1))
        found = np.zeros((*ids.shape, self.vocab_size))
        for start in range(0, len(rows), size):
            these = rows[start : start + size]
            filled = ids[np.concatenate([these, np.repeat(these[:1], size - len(these))])]
            found[these] = np.asarray(self.model.logits(filled))[: len(these)]
        found[..., mask_id] = -np.inf
        return found

    def rng(self, pair: Pair) -> np.random.Generator:
        """Depends on the seed and the ids of the pair."""
        return np.random.default_rng([self.seed, zlib.crc32(np.array(pair.ids, np.int64))])

    def mean(self, score: Callable[[slice], float], draws: int) -> float:
        """The mean over draws of score(draws), `batch_size` of them at a time."""
        total = 0.0
        for start in range(0, draws, self.batch_size):
            part = slice(start, min(start + self.batch_size, draws))
            total += score(part) * (part.stop - part.start)
        return total / draws


def llada(run: MonteCarlo, pair: Pair) -> tuple[float, bool]:
    """(score, whether decoding by confidence gives the answer)."""
    prompt, answer, mask_id = [*pair.prompt], [*pair.answer], run.model.mask_id
    draws = 1 if len(answer) == 1 else run.draws or 128
    rows = STRATIFIED if draws % STRATIFIED == 0 else draws
    masks = mc.draw_masks(run.rng(pair), len(answer), draws, rows)
    settings = {"mask_id": mask_id, "cfg": run.cfg}

    def score(part: slice) -> float:
        return mc.llada_score(run.logits_of, prompt, answer, masks[part], **settings)

    greedy = mc.llada_greedy_answer(run.logits_of, prompt, len(answer), **settings)
    return run.mean(score, draws), greedy == answer


def _duo(run: MonteCarlo, pair: Pair, *, suffix: bool) -> tuple[float, bool]:
    tokenizer, mask_id = run.model.tokenizer, run.model.mask_id
    sentence = [tokenizer.bos_id, *pair.ids, tokenizer.eos_id]
    prefix, draws, rng = 1 + len(pair.prompt), run.draws or 1024, run.rng(pair)
    t = EPS + (1 - EPS) * ((rng.random() + np.arange(draws)) / draws)
    masks = rng.random((draws, len(sentence))) < (1 - EPS) * t[:, None]

    def score(part: slice) -> float:
        args = run.logits_of, sentence, masks[part]
        if suffix:
            return mc.duo_suffix_score(*args, prefix=prefix, mask_id=mask_id)
        return mc.duo_full_score(*args, t[part], mask_id=mask_id)

    greedy = mc.duo_one_pass_answer(run.logits_of, sentence, prefix=prefix, mask_id=mask_id)
    return run.mean(score, draws), greedy == [*pair.answer]


def duo_full(run: MonteCarlo, pair: Pair) -> tuple[float, bool]:
    """(score, whether one pass over the masked answer gives it)."""
    return _duo(run, pair, suffix=False)


def duo_suffix(run: MonteCarlo, pair: Pair) -> tuple[float, bool]:
    """(score, whether one pass over the masked answer gives it)."""
    return _duo(run, pair, suffix=True)


MONTE_CARLO = {"llada": llada, "duo_full": duo_full, "duo_suffix": duo_suffix}
EXTRA_TOKENS = {"llada": 0, "duo_full": 2, "duo_suffix": 2}  # BOS and EOS
