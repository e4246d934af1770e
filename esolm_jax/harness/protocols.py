"""Monte-Carlo scores of a prompt and an answer, by the names of the harnesses that publish them.

llada        LLaDA's: l of the N tokens of the answer are masked, l about uniform; 128 draws
duo_full     Duo's: any token of BOS, prompt, answer, EOS is masked; a mean per token of all of
             them; 1,024 draws
duo_suffix   Duo's: the prompt is restored, and answer and EOS are scored; NaN if a draw masks
             nothing, as published; 1,024 draws

Draws and sums are those of evaluation/masked_likelihood.py. Masks follow from a seed and the ids
of the pair, so a score does not depend on the other pairs. Scores of different protocols, and exact
ones, cannot be compared.
"""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from esolm_jax.data.tokenizer import Tokenizer
from esolm_jax.evaluation.answer_likelihood import Pair
from esolm_jax.evaluation.masked_likelihood import Draws, MaskedLikelihood, duo_draws, llada_draws
from esolm_jax.evaluation.protocol import multiple_choice as mc

STRATIFIED = 32  # draws of LLaDA that are stratified together


@dataclasses.dataclass(frozen=True)
class MonteCarlo:
    """Settings of the draws; `draws`: masks of each pair, 0 = as published."""

    likelihood: MaskedLikelihood
    tokenizer: Tokenizer
    draws: int = 0
    seed: int = 0

    @property
    def mask_id(self) -> int:
        return self.likelihood.built.special.mask

    def rng(self, pair: Pair) -> np.random.Generator:
        """Depends on the seed and the ids of the pair."""
        return np.random.default_rng([self.seed, zlib.crc32(np.array(pair.ids, np.int64))])

    def score(self, ids: Sequence[int], draws: Draws, prompt: int = 0) -> float:
        """The estimate of the log-likelihood."""
        return -float(self.likelihood.nll(ids, draws, prompt=prompt).mean())


def llada(run: MonteCarlo, pair: Pair) -> tuple[float, bool]:
    """(score, whether decoding by confidence gives the answer)."""
    prompt, answer = len(pair.prompt), [*pair.answer]
    count = 1 if len(answer) == 1 else run.draws or 128
    rows = STRATIFIED if count % STRATIFIED == 0 else count
    draws = llada_draws(run.rng(pair), prompt, len(answer), count, rows)
    best = run.likelihood.best_of(prompt)
    greedy = mc.llada_greedy_answer(best, pair.prompt, len(answer), mask_id=run.mask_id)
    return run.score(pair.ids, draws, prompt), greedy == answer


def _duo(run: MonteCarlo, pair: Pair, *, suffix: bool) -> tuple[float, bool]:
    sentence = [run.tokenizer.bos_id, *pair.ids, run.tokenizer.eos_id]
    sizes = len(pair.prompt), len(pair.answer), run.draws or 1024
    draws, best = duo_draws(run.rng(pair), *sizes, suffix=suffix), run.likelihood.best_of()
    prefix = 1 + len(pair.prompt)
    greedy = mc.duo_one_pass_answer(best, sentence, prefix=prefix, mask_id=run.mask_id)
    return run.score(sentence, draws), greedy == [*pair.answer]


def duo_full(run: MonteCarlo, pair: Pair) -> tuple[float, bool]:
    """(score, whether one pass over the masked answer gives it)."""
    return _duo(run, pair, suffix=False)


def duo_suffix(run: MonteCarlo, pair: Pair) -> tuple[float, bool]:
    """(score, whether one pass over the masked answer gives it)."""
    return _duo(run, pair, suffix=True)


MONTE_CARLO = {"llada": llada, "duo_full": duo_full, "duo_suffix": duo_suffix}
EXTRA_TOKENS = {"llada": 0, "duo_full": 2, "duo_suffix": 2}  # BOS and EOS
