"""The metrics of texts by name, and judge(): all figures of a list of texts.

A new metric is one file and one entry here, or one call of `register`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from esolm_jax.errors import UserError, nearest
from esolm_jax.evaluation.protocol.judge import Judge
from esolm_jax.evaluation.quality import diversity, mauve, perplexity
from esolm_jax.evaluation.quality.judged import Judged, QualitySettings
from esolm_jax.evaluation.quality.text_file import Texts
from esolm_jax.registry import Registry


def _always(judged: Judged) -> bool:
    del judged
    return True


@dataclasses.dataclass(frozen=True)
class TextMetric:
    """A metric of texts.

    Attributes:
      compute: its figures, JSON-able. line: the figures in one line.
      applies: whether it can be computed with these settings.
    """

    name: str
    compute: Callable[[Judged], dict[str, Any]]
    line: Callable[[dict[str, Any]], str]
    applies: Callable[[Judged], bool] = _always


_METRICS: Registry[TextMetric] = Registry(
    "metric of texts",
    {
        metric.name: metric
        for metric in (
            TextMetric(perplexity.NAME, perplexity.compute, perplexity.line),
            TextMetric(diversity.ENTROPY, diversity.compute_entropy, diversity.entropy_line),
            TextMetric(diversity.DISTINCT, diversity.compute_distinct, diversity.by_n_line),
            TextMetric(diversity.REPETITION, diversity.compute_repetition, diversity.by_n_line),
            TextMetric(mauve.NAME, mauve.compute, mauve.line, mauve.applies),
        )
    },
)
register, unregister = _METRICS.register, _METRICS.unregister


def names() -> tuple[str, ...]:
    """Of all metrics."""
    return tuple(_METRICS)


def check_names(wanted: Sequence[str], *, has_references: bool) -> None:
    """UserError: an unknown metric, or MAUVE without reference texts."""
    for name in wanted:
        if name not in _METRICS:
            known = ", ".join(_METRICS)
            raise UserError(f"metrics={name}: must be of {known}{nearest(name, _METRICS)}")
    if mauve.NAME in wanted and not has_references:
        raise UserError("metrics=mauve: must have references, texts to compare with")


def judge(
    texts: Texts, model: Judge, settings: QualitySettings, wanted: Sequence[str] = ()
) -> dict[str, Any]:
    """The figures of texts, JSON-able: counts, and `metrics` by name, each with its `summary`.

    Args:
      wanted: names of metrics; () = all that can be computed.

    Raises:
      UserError: an unknown metric, or texts that the judge cannot read.
    """
    check_names(wanted, has_references=settings.references is not None)
    judged = Judged(texts, model, settings)
    found = {}
    for name, metric in _METRICS.items():
        if name in wanted or (not wanted and metric.applies(judged)):
            figures = metric.compute(judged)
            found[name] = figures | {"summary": metric.line(figures)}
    return {**judged.counts, "max_length": settings.max_length, "metrics": found}


def table(figures: dict[str, Any]) -> list[str]:
    """Lines to print: the counts, and a row for each metric."""
    counts = f"{figures['num_texts']:,} texts"
    for name, what in (
        ("num_truncated", f"cut to {figures['max_length']:,} tokens"),
        ("num_empty", "empty"),
        ("num_not_round_trip", "changed by the judge's tokenizer"),
    ):
        if figures[name]:
            counts += f"; {figures[name]:,} {what}"
    width = max(map(len, figures["metrics"]), default=0)
    return [
        counts,
        *(f"{name:<{width}}  {entry['summary']}" for name, entry in figures["metrics"].items()),
    ]
