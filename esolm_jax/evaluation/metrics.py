"""The metrics by name.

A new metric is one file, one entry here and its name in config/sections/evaluation.py, which must
not import this module; or one call of `register`.
"""

from esolm_jax.config import METRICS
from esolm_jax.evaluation.bounds import IMPORTANCE_WEIGHTED, NELBO
from esolm_jax.evaluation.metric import Metric

_METRICS: dict[str, Metric] = {metric.name: metric for metric in (NELBO, IMPORTANCE_WEIGHTED)}


def register(metric: Metric) -> Metric:
    """Adds a metric; config.eval.metrics and config.train.metrics can then name it. ValueError if
    the name is taken."""
    if metric.name in _METRICS:
        raise ValueError(f"metric {metric.name!r}: is registered already")
    _METRICS[metric.name] = metric
    METRICS.append(metric.name)
    return metric


def unregister(name: str) -> None:
    """Removes a metric, such as one of a test."""
    del _METRICS[name]
    METRICS.remove(name)


def selected(names: str, config) -> list[Metric]:
    """The metrics that a comma-separated list names, without those that do not apply."""
    metrics = [_METRICS[name.strip()] for name in names.split(",")]
    return [metric for metric in metrics if metric.applies(config)]
