"""The metrics by name.

A new metric is one file, one entry here and its name in config/sections/evaluation.py, which must
not import this module; or one call of `register`.
"""

from esolm_jax.config import METRICS
from esolm_jax.evaluation.bounds import IMPORTANCE_WEIGHTED, NELBO
from esolm_jax.evaluation.metric import Metric
from esolm_jax.evaluation.sampler_metric import SAMPLER
from esolm_jax.registry import Registry

_METRICS: Registry[Metric] = Registry(
    "metric",
    {metric.name: metric for metric in (NELBO, IMPORTANCE_WEIGHTED, SAMPLER)},
    names=METRICS,
)
register, unregister = _METRICS.register, _METRICS.unregister  # names of config.*.metrics


def selected(names: str, config) -> list[Metric]:
    """The metrics that a comma-separated list names, without those that do not apply."""
    metrics = [_METRICS[name.strip()] for name in names.split(",")]
    return [metric for metric in metrics if metric.applies(config)]
