"""The figures of a report from sums over blocks of windows, with jackknife errors.

A figure is a function of sums over all blocks. Its error is that of the jackknife which leaves out
one block at a time, in each data set: the variation from other windows and other noise.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from esolm_jax.evaluation.likelihood import Estimate
from esolm_jax.evaluation.report.window_sums import CELL, CONFIDENCE_BINS, WindowSums

ECE = (
    "expected calibration error: Σ over bins of (predictions in the bin / all predictions) · "
    f"|accuracy − mean confidence|, for {CONFIDENCE_BINS} bins of equal width of the probability "
    "of the most likely token"
)
_COUNT, _CONFIDENCE, _IS_TOP, _ENTROPY, _NLL = range(len(CELL))


def with_error(
    figure: Callable[[np.ndarray], np.ndarray], data_sets: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(figure of the sums of all blocks, its standard error; NaN if a data set has one block).

    Args:
      figure: sums → an array. data_sets: float64 [blocks, …] each.
    """
    total = np.sum([blocks.sum(axis=0) for blocks in data_sets], axis=0)
    value = figure(total)
    variance = np.zeros_like(value)
    for blocks in data_sets:
        left_out = np.array([figure(total - block) for block in blocks])
        squares = ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0)
        variance += squares * (len(blocks) - 1) / len(blocks) if len(blocks) > 1 else np.nan
    return value, np.sqrt(variance)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is 0 (up to the rounding of a difference of sums)."""
    has = np.abs(b) > 1e-6
    return np.where(has, a / np.where(has, b, 1), np.nan)


def _perplexity(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def positions(data_sets: Sequence[WindowSums]) -> list[dict[str, Any]]:
    """Nats per token of each bin of positions."""
    value, error = with_error(
        lambda sums: _ratio(sums[:, 0], sums[:, 1]), [one.positions for one in data_sets]
    )
    nats, tokens = np.sum([one.positions.sum(axis=0) for one in data_sets], axis=0).T
    edges = data_sets[0].position_edges
    return [
        {
            "first": int(edges[i]),
            "last": int(edges[i + 1]) - 1,
            "tokens": int(tokens[i]),
            "nats": float(nats[i]),
            "nll_per_token": float(value[i]),
            "standard_error": float(error[i]),
            "perplexity": _perplexity(float(value[i])),
        }
        for i in range(len(tokens))
    ]


def _summary(cells: np.ndarray) -> np.ndarray:
    """[groups, bins, 5] → [groups, 6]: the fields of _FIELDS."""
    total = cells.sum(axis=1)
    means = _ratio(total[:, 1:], total[:, :1])
    gap = np.abs(cells[..., _IS_TOP] - cells[..., _CONFIDENCE]).sum(axis=1)
    ece = _ratio(gap, total[:, _COUNT])
    confidence, accuracy, entropy, nll = means.T
    return np.stack([accuracy, confidence, ece, entropy, nll, nll - entropy], axis=1)


_FIELDS = ("accuracy", "mean_confidence", "ece", "mean_entropy", "mean_nll", "nll_minus_entropy")


def _bins(cells: np.ndarray) -> list[dict[str, Any]]:
    """The reliability diagram: [bins, 5] → bins with predictions."""
    found = []
    for i, cell in enumerate(cells):
        if cell[_COUNT] > 0:
            confidence, accuracy = cell[_CONFIDENCE], cell[_IS_TOP]
            found.append(
                {
                    "low": i / CONFIDENCE_BINS,
                    "high": (i + 1) / CONFIDENCE_BINS,
                    "count": int(cell[_COUNT]),
                    "confidence": float(confidence / cell[_COUNT]),
                    "accuracy": float(accuracy / cell[_COUNT]),
                }
            )
    return found


def _with_all(cells: np.ndarray) -> np.ndarray:
    """The groups, and in front of them, if there are several, their sum."""
    if cells.shape[-3] == 1:
        return cells
    return np.concatenate([cells.sum(axis=-3, keepdims=True), cells], axis=-3)


def calibration(data_sets: Sequence[WindowSums]) -> list[dict[str, Any]]:
    """The calibration of predicted tokens: of all of them, then of each group with any."""
    names = data_sets[0].groups
    names = names if len(names) == 1 else ("all", *names)
    cells = [_with_all(one.cells) for one in data_sets]
    value, error = with_error(_summary, cells)
    total = np.sum([one.sum(axis=0) for one in cells], axis=0)
    groups = []
    for i, name in enumerate(names):
        count = int(total[i, :, _COUNT].sum())
        if count:
            figures = dict(zip(_FIELDS, value[i].tolist(), strict=True))
            errors = {
                f"{field}_standard_error": float(error[i, _FIELDS.index(field)])
                for field in ("ece", "nll_minus_entropy")
            }
            bins = _bins(total[i])
            groups.append({"group": name, "predictions": count, **figures, **errors, "bins": bins})
    return groups


def merged(estimates: Sequence[Estimate]) -> Estimate:
    """The estimate for all windows of several data sets, whose noise is independent."""
    tokens = sum(one.num_tokens for one in estimates)
    nats = sum(one.nll * one.num_tokens for one in estimates)
    variance = sum((one.standard_error * one.num_tokens) ** 2 for one in estimates)
    return Estimate(
        nll=nats / tokens,
        standard_error=math.sqrt(variance) / tokens,
        num_tokens=tokens,
        error_samples=sum(one.error_samples for one in estimates),
        window_nll=np.concatenate([one.window_nll for one in estimates]),
        window_tokens=np.concatenate([one.window_tokens for one in estimates]),
    )
