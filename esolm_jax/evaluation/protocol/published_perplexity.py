"""Generative perplexity: how likely a judge finds generated texts, by two published protocols.

Both depend on which texts share a call, and can only be compared with figures of the same variant,
`max_length` and batch size. Texts are tokenized by the judge's tokenizer, truncated to `max_length`
and padded with EOS to the longest of the call. The last `len(texts) % batch_size` texts are
*dropped*; a batch is never larger than the number of texts.

"pooled" (Eso-LM, Duo, MDLM): texts are cut into contexts of `context_length` tokens, in each of
which the first token is not scored. Every other token that is not EOS is scored, and so is the
first EOS of each context (none, if that is its first token). Since padding is EOS, a text without
EOS that is shorter than its longest neighbour has its *first pad* scored; alone it has not.
`perplexity` is exp(nll / num_tokens).

"bd3" (BD3-LM): contexts overlap: each begins `stride` tokens after the last one, and only its new
tokens are scored. No EOS is scored. `perplexity` is the *mean over batches* of the perplexity of
each batch, without batches that have nothing to score. `entropy` is of the padded ids, so short
texts next to a long one look repetitive, and it is a *sum* over each batch, averaged over batches:
batch-size times too large.

Token ids are scored as they are, each row one context, independent of `max_length` and
`context_length`; they must have equal lengths.

The published metrics accumulate over calls: add `nll` and `num_tokens` of several calls. Sums are
float64 here and float32 there. With nothing to score the perplexity is NaN.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esolm_jax.errors import UserError, nearest
from esolm_jax.evaluation.protocol.judge import Judge, pad_rows
from esolm_jax.evaluation.protocol.unigram_entropy import entropy

VARIANTS = ("pooled", "bd3")


def generative_perplexity(
    judge: str | Path | Judge,
    texts: Sequence[str] | Sequence[Sequence[int]],
    *,
    variant: str = "pooled",
    max_length: int = 1024,
    batch_size: int | None = None,
    stride: int = 512,
    perplexity_batch_size: int = 8,
    context_length: int = 1024,
) -> dict[str, Any]:
    """Perplexity of generated texts under a judge, as published; see the module's description.

    Args:
      judge: a folder of the Hugging Face hub (GPT-2, Llama, Qwen), or a `Judge` (read once, for
        several calls).
      texts: texts with special tokens spelled out, or rows of the judge's token ids.
      batch_size: None: perplexity_batch_size.

    Returns:
      perplexity; nll (sum, nats); num_tokens (scored); num_dropped (texts).
      pooled: text_nll, text_num_tokens: of each text that was not dropped.
      bd3: entropy; batch_perplexities, batch_entropies, batch_num_tokens: of each batch.

    Raises:
      UserError: no texts, an unknown variant, or a value that is out of range.
    """
    if variant not in VARIANTS:
        advice = nearest(str(variant), VARIANTS)
        raise UserError(f"variant={variant!r}: must be pooled or bd3{advice}")
    batch_size = perplexity_batch_size if batch_size is None else batch_size
    _check_positive(
        batch_size=batch_size, max_length=max_length, stride=stride, context_length=context_length
    )
    if isinstance(texts, str):
        raise UserError("texts: must be a list of texts, not one string")
    if not len(texts):
        raise UserError("texts: must have at least one text")
    judge = judge if isinstance(judge, Judge) else Judge(judge)
    are_texts = all(isinstance(text, str) for text in texts)
    ids = _tokenized(judge, texts, max_length) if are_texts else _rows(texts)
    batch_size = min(batch_size, len(ids))
    num_dropped = len(ids) % batch_size
    ids = ids[: len(ids) - num_dropped]
    context_length = context_length if are_texts else max(ids.shape[1], 1)
    if variant == "pooled":
        found = _pooled(judge, ids, context_length)
    else:
        found = _bd3(judge, ids, batch_size, context_length, stride)
    return found | {"num_dropped": num_dropped}


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name}={value}: must be positive")


def _tokenized(judge: Judge, texts: Sequence, max_length: int) -> np.ndarray:
    """int32 [n, T]: ids, truncated, and padded with EOS to the longest."""
    return pad_rows([row[:max_length] for row in judge.encode(texts)], judge.eos_id)


def _rows(ids: Sequence) -> np.ndarray:
    if any(isinstance(row, str) for row in ids) or len({len(row) for row in ids}) > 1:
        raise UserError("texts: must be all texts, or all rows of token ids of equal length")
    return np.asarray(ids, np.int32)


def pooled_token_nll(
    judge: Judge, ids: np.ndarray, context_length: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """(nll, scored), float32 and bool [n, T]: tokens of padded rows in the "pooled" variant."""
    nll, scored = np.zeros(ids.shape, np.float32), np.zeros(ids.shape, bool)
    for start in range(0, ids.shape[1], context_length):
        chunk = slice(start, start + context_length)
        is_eos = ids[:, chunk] == judge.eos_id
        is_first_eos = is_eos & (np.cumsum(is_eos, axis=1) == 1)
        scored[:, chunk] = ~is_eos | is_first_eos
        scored[:, start] = False
        nll[:, chunk] = judge.score(ids[:, chunk], scored[:, chunk])
    return nll, scored


def _pooled(judge: Judge, ids: np.ndarray, context_length: int) -> dict[str, Any]:
    nll, scored = pooled_token_nll(judge, ids, context_length)
    text_nll = nll.sum(axis=1, dtype=np.float64)
    text_num_tokens = scored.sum(axis=1)
    total, count = float(text_nll.sum()), int(text_num_tokens.sum())
    return {
        "perplexity": _perplexity(total, count),
        "nll": total,
        "num_tokens": count,
        "text_nll": text_nll,
        "text_num_tokens": text_num_tokens,
    }


def _contexts(length: int, context_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first new token, end) of each context of `length` tokens."""
    scored_to = 0
    for start in range(0, length, stride):
        end = min(start + context_length, length)
        yield start, max(scored_to, start), end
        scored_to = end
        if end == length:
            return


def _bd3(
    judge: Judge, ids: np.ndarray, batch_size: int, context_length: int, stride: int
) -> dict[str, Any]:
    counts = ids != judge.eos_id
    text_nll, text_num_tokens = np.zeros(len(ids)), np.zeros(len(ids), np.int64)
    for start, new, end in _contexts(ids.shape[1], context_length, stride):
        scored = counts[:, start:end].copy()
        scored[:, : max(new - start, 1)] = False
        text_nll += judge.score(ids[:, start:end], scored).sum(axis=1, dtype=np.float64)
        text_num_tokens += scored.sum(axis=1)
    nll, num_tokens, entropies = (
        values.reshape(-1, batch_size).sum(axis=1)
        for values in (text_nll, text_num_tokens, entropy(ids))
    )
    perplexities = [_perplexity(*batch) for batch in zip(nll, num_tokens, strict=True)]
    finite = [value for value in perplexities if not math.isnan(value)]
    return {
        "perplexity": float(np.mean(finite)) if finite else math.nan,
        "nll": float(nll.sum()),
        "num_tokens": int(num_tokens.sum()),
        "entropy": float(entropies.mean()),
        "batch_perplexities": np.array(perplexities),
        "batch_entropies": entropies,
        "batch_num_tokens": num_tokens,
    }


def _perplexity(nll: float, num_tokens: int) -> float:
    if not num_tokens:
        return math.nan
    try:
        return math.exp(nll / num_tokens)
    except OverflowError:
        return math.inf
