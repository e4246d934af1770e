"""Generative perplexity: how likely the judge finds the texts.

per_text   each text alone. A text longer than the judge's context is cut into contexts. All tokens
           are scored but the first of each context; with a judge that has a start token, the first
           too. No text is dropped, and no figure depends on a batch or on the other texts.
pooled     as Eso-LM, Duo and MDLM publish it
bd3        as BD3-LM publishes it; both: see evaluation/protocol/published_perplexity.py

Figures of different variants cannot be compared.
"""

import math
from typing import Any

import numpy as np

from esolm_jax.evaluation.protocol.judge import Judge, pad_rows
from esolm_jax.evaluation.protocol.published_perplexity import generative_perplexity
from esolm_jax.evaluation.quality.judged import Judged

NAME = "generative_perplexity"


def text_nll(judge: Judge, ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(nats, scored tokens) of each text alone: float64 and int64 [n]."""
    width = judge.context_length
    contexts = [
        (n, row[start : start + width])
        for n, row in enumerate(ids)
        for start in range(0, len(row), width)
    ]
    nll, count = np.zeros(len(ids)), np.zeros(len(ids), np.int64)
    if not contexts:
        return nll, count
    owner = np.array([n for n, _ in contexts])
    rows = pad_rows([row for _, row in contexts], judge.eos_id)
    lengths = np.array([len(row) for _, row in contexts])
    scored = np.arange(rows.shape[1])[None] < lengths[:, None]
    scored[:, 0] &= judge.scores_first
    found = judge.score(rows, scored).sum(axis=1, dtype=np.float64)
    np.add.at(nll, owner, found)
    np.add.at(count, owner, scored.sum(axis=1))
    return nll, count


def standard_error(nll: np.ndarray, count: np.ndarray) -> float:
    """Of Σ nll / Σ count, in nats per token, over the choice of the texts; NaN for one text."""
    n = len(nll)
    if n < 2 or not count.sum():
        return math.nan
    residual = nll - nll.sum() / count.sum() * count
    return float(math.sqrt(n / (n - 1) * (residual**2).sum()) / count.sum())


def compute(judged: Judged) -> dict[str, Any]:
    """The figures; `standard_error` is of nats per token, over the choice of the texts."""
    s = judged.settings
    if s.variant == "per_text":
        nll, count = text_nll(judged.judge, judged.ids)
        total, num_tokens = float(nll.sum()), int(count.sum())
        mean = total / num_tokens if num_tokens else math.nan
        found = {
            "perplexity": math.exp(mean) if not mean > 700 else math.inf,
            "nll": total,
            "num_tokens": num_tokens,
            "num_dropped": 0,
            "standard_error": standard_error(nll, count),
        }
    else:
        given = judged.ids if judged.spelled is None else judged.spelled
        names = ("perplexity", "nll", "num_tokens", "num_dropped")
        found = generative_perplexity(
            judged.judge,
            given,
            variant=s.variant,
            max_length=s.max_length,
            batch_size=s.published_batch_size,
        )
        found = {name: found[name] for name in names}
    return {"variant": s.variant, **found}


def line(figures: dict[str, Any]) -> str:
    error = figures.get("standard_error", math.nan)
    mean = figures["nll"] / max(figures["num_tokens"], 1)
    text = f"perplexity {figures['perplexity']:.4g} ({figures['variant']}), {mean:.4f} nats a token"
    text += "" if math.isnan(error) else f" ± {error:.4f}"
    text += f", {figures['num_tokens']:,} tokens scored"
    dropped = figures["num_dropped"]
    return text + (f"; {dropped} texts dropped, as published" if dropped else "")
