"""Multiple-choice scores by Monte Carlo, as LLaDA's and Duo's harnesses take them.

A model is a function `logits_of`: int [B, n] token ids → logits [B, n, V] of any float type, where
ids equal to the mask id are unknown. Scores are log-likelihood estimates in nats, computed in
float64 from the logits; the larger, the better.

LLaDA: l of the N answer tokens are masked, l about uniform on 1..N, the prompt never.
Duo: tokens are BOS, prompt, answer, EOS, and each is masked with probability 1 − α_t.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from esolm_jax.errors import UserError
from esolm_jax.family.noise import EPS

LogitsOf = Callable[[np.ndarray], np.ndarray]
BestOf = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
Ids = Sequence[int]


def log_softmax(logits: ArrayLike) -> np.ndarray:
    """Over the last axis, in float64."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def best_of(logits_of: LogitsOf) -> BestOf:
    """ids [B, n] → the most likely token at each position, and its log-probability: [B, n]."""

    def best(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_p = log_softmax(logits_of(ids))
        return log_p.argmax(axis=-1), log_p.max(axis=-1)

    return best


# LLaDA.


def stratified_counts(length: int, rows: int, first: int) -> np.ndarray:
    """How many of `length` answer tokens are masked in each of `rows` draws: int64 [rows].

    `first` is uniform on 1..length; the counts of a batch are spread evenly behind it. As
    published, halves are rounded to even numbers: where `length / rows` makes halves, even counts
    are drawn more often than odd ones (length 4, rows 8: three times), so they are not uniform.
    """
    steps = np.rint(first + np.arange(rows) * length / rows).astype(np.int64)
    return (steps - 1) % length + 1


def draw_masks(rng: np.random.Generator, length: int, num_draws: int, rows: int) -> np.ndarray:
    """Masks over an answer, stratified in batches of `rows` draws: bool [num_draws, length].
    UserError unless rows divides num_draws."""
    if num_draws % rows:
        raise UserError(f"rows={rows}: must divide num_draws={num_draws}")
    counts = [
        stratified_counts(length, rows, int(rng.integers(1, length + 1)))
        for _ in range(num_draws // rows)
    ]
    return np.array([rng.permutation(length) < count for count in np.concatenate(counts)])


def with_guidance(logits_of: LogitsOf, prompt_length: int, mask_id: int, cfg: float) -> LogitsOf:
    """Classifier-free guidance: u + (cfg + 1)(c − u), where u does not see the prompt."""
    if cfg == 0:
        return logits_of

    def guided(ids: np.ndarray) -> np.ndarray:
        blind = ids.copy()
        blind[:, :prompt_length] = mask_id
        conditional, unconditional = (
            np.asarray(logits_of(each), np.float64) for each in (ids, blind)
        )
        return unconditional + (cfg + 1) * (conditional - unconditional)

    return guided


def llada_weight(masks: np.ndarray) -> np.ndarray:
    """N / l at the masked tokens of an answer, 0 elsewhere: float64 [draws, N]."""
    return masks / masks.mean(axis=1, keepdims=True)


def llada_score(
    logits_of: LogitsOf,
    prompt: Ids,
    answer: Ids,
    masks: ArrayLike,
    *,
    mask_id: int,
    cfg: float = 0.0,
) -> float:
    """Log-likelihood of an answer: −mean over draws of Σ −log p / (l/N) over the masked tokens.

    Args:
      masks: bool [draws, N], such as `draw_masks` gives, each with a masked token. LLaDA takes 128
        draws, dLLM 32; an answer of one token needs one.
      cfg: strength of classifier-free guidance.
    """
    masks = np.asarray(masks, bool)
    start = len(prompt)
    ids = np.tile(np.array([*prompt, *answer], np.int32), (len(masks), 1))
    ids[:, start:][masks] = mask_id
    log_p = log_softmax(with_guidance(logits_of, start, mask_id, cfg)(ids))[:, start:]
    nll = -np.take_along_axis(log_p, np.asarray(answer)[None, :, None], axis=-1)[..., 0]
    return float(-(llada_weight(masks) * nll).sum(axis=1).mean())


def llada_greedy_answer(best: BestOf, prompt: Ids, length: int, *, mask_id: int) -> list[int]:
    """The answer of `length` tokens by one token per pass, the most confident one first."""
    start = len(prompt)
    ids = np.array([[*prompt, *[mask_id] * length]], np.int32)
    for _ in range(length):
        token, log_p = (found[0, start:] for found in best(ids))
        confidence = np.where(ids[0, start:] == mask_id, log_p, -np.inf)
        position = int(np.argmax(confidence))
        ids[0, start + position] = token[position]
    return ids[0, start:].tolist()


# Duo.


def duo_full_weight(masks: np.ndarray, t: ArrayLike) -> np.ndarray:
    """Weights of masked tokens, whose sum of −log p is a mean over the sentence; 0 elsewhere:
    float64 [draws, n]."""
    weight = (1 - EPS) / ((1 - EPS) * np.asarray(t, np.float64))
    return masks * weight[:, None] / masks.shape[1]


def duo_suffix_weight(masks: np.ndarray, prefix: int) -> np.ndarray:
    """As duo_full_weight, over answer and EOS; NaN in draws that mask nothing."""
    in_answer = np.arange(masks.shape[1]) >= prefix
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = (1 - EPS) / masks.mean(axis=1)[:, None] * (masks & in_answer)
    return weight / (masks.shape[1] - prefix)


def duo_full_score(
    logits_of: LogitsOf, sentence: ArrayLike, masks: ArrayLike, t: ArrayLike, *, mask_id: int
) -> float:
    """Log-likelihood of a sentence by a diffusion model, *per token* (mode "full").

    −mean over draws and over all tokens, prompt included, of weight · (−log p) at masked ones,
    weight = (1 − ε)/(1 − α_t). So choices of unequal length are compared per token of the whole
    sentence.

    Args:
      sentence: BOS, prompt, answer, EOS.
      masks: bool [draws, n] over the whole sentence. t: float [draws]; α_t = 1 − (1 − ε) t.
    """
    masks = np.asarray(masks, bool)
    nll = _masked_nll(logits_of, sentence, masks, mask_id)
    return float(-(duo_full_weight(masks, t) * nll).sum(axis=1).mean())


def duo_suffix_score(
    logits_of: LogitsOf, sentence: ArrayLike, masks: ArrayLike, *, prefix: int, mask_id: int
) -> float:
    """Log-likelihood of answer and EOS by a diffusion model, per token (mode "suffix").

    As `duo_full_score`, but the prompt is restored, 1 − α_t is replaced by the masked fraction *of
    the whole sentence*, and the mean is over answer and EOS. A draw that masks nothing makes the
    score NaN (∞ · 0); at the published 1,024 draws that is nearly certain.

    Args:
      sentence, masks: as of `duo_full_score`. prefix: tokens before the answer.
    """
    masks = np.asarray(masks, bool)
    in_answer = np.arange(masks.shape[1]) >= prefix
    nll = _masked_nll(logits_of, sentence, masks & in_answer, mask_id)
    return float(-(duo_suffix_weight(masks, prefix) * nll).sum(axis=1).mean())


def _masked_nll(
    logits_of: LogitsOf, sentence: ArrayLike, masks: np.ndarray, mask_id: int
) -> np.ndarray:
    """−log p of each masked token, 0 elsewhere: float64 [draws, n]."""
    ids = np.asarray(sentence, np.int32)
    log_p = log_softmax(logits_of(np.where(masks, mask_id, ids[None]).astype(np.int32)))
    return -np.take_along_axis(log_p, ids[None, :, None], axis=-1)[..., 0] * masks


def duo_ar_score(logits_of: LogitsOf, sentence: Ids, *, prefix: int) -> float:
    """Mean log p of answer and EOS by an autoregressive model, whose row i predicts token i + 1
    (mode "ar")."""
    ids = np.asarray(sentence, np.int32)
    log_p = log_softmax(logits_of(ids[None]))[0, :-1]
    return float(np.take_along_axis(log_p, ids[1:, None], axis=-1)[prefix - 1 :].mean())


def duo_one_pass_answer(best: BestOf, sentence: Ids, *, prefix: int, mask_id: int) -> list[int]:
    """The most likely token at each position of the answer, all of them masked; EOS is visible."""
    ids = np.array([sentence], np.int32)
    ids[0, prefix:-1] = mask_id
    return best(ids)[0][0, prefix:-1].tolist()


def encode_pair(
    encode: Callable[[str], list[int]], context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Ids of a context and of its continuation, as the harnesses cut them.

    White space at the end of the context moves to the continuation. The continuation's ids are
    those of the whole text behind as many ids as the context alone has, also where the boundary
    merges into one token; then the continuation comes out shorter, or empty.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    context_ids = encode(stripped)
    return context_ids, encode(stripped + continuation)[len(context_ids) :]
