"""Diversity of texts: entropy, distinct-n and repetition. No judge but its tokenizer is needed.

entropy     of the distribution of tokens within each text, in nats, averaged over texts: of the ids
            in the file, else of the judge's. English text of 1,024 GPT-2 tokens has about 5.4.
distinct_n  different n-grams over all n-grams, of all texts together. It falls with the number of
            tokens, so compare equal numbers.
repetition_n  1 − different n-grams over all n-grams within a text, averaged over texts
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from esolm_jax.evaluation.protocol.unigram_entropy import entropy
from esolm_jax.evaluation.quality.judged import Judged

ENTROPY, DISTINCT, REPETITION = NAMES = ("entropy", "distinct", "repetition")
DISTINCT_N, REPETITION_N = (1, 2, 3, 4), (2, 3, 4)


def ngrams(ids: Sequence[int], n: int) -> Iterable[tuple[int, ...]]:
    """All n-grams of a text, in order."""
    return zip(*(ids[i:] for i in range(n)), strict=False)


def distinct(rows: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of all rows over all their n-grams; NaN if there are none."""
    found = [gram for row in rows for gram in ngrams(row, n)]
    return len(set(found)) / len(found) if found else float("nan")


def compute_entropy(judged: Judged) -> dict[str, Any]:
    """The mean over texts, and its standard error over the choice of the texts."""
    own = judged.given.token_ids is not None
    rows = judged.given.token_ids if own else judged.ids
    values = entropy([np.asarray(row, np.int64) for row in rows or []])
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return {
        "mean": float(values.mean()),
        "standard_error": float(error),
        "tokens": "of the file" if own else "of the judge",
    }


def entropy_line(figures: dict[str, Any]) -> str:
    return f"{figures['mean']:.3f} nats a text (tokens {figures['tokens']})"


def compute_distinct(judged: Judged) -> dict[str, Any]:
    return {str(n): distinct(judged.ids, n) for n in DISTINCT_N}


def compute_repetition(judged: Judged) -> dict[str, Any]:
    def mean(n: int) -> float:
        values = [1 - distinct([row], n) for row in judged.ids if len(row) >= n]
        return float(np.mean(values)) if values else float("nan")

    return {str(n): mean(n) for n in REPETITION_N}


def by_n_line(figures: dict[str, Any]) -> str:
    return ", ".join(f"{n}-grams {value:.4f}" for n, value in figures.items())
