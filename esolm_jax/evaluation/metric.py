"""Metric: one figure of a trained model on a split. The registry is in metrics.py."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

from esolm_jax.errors import UserError
from esolm_jax.model.build import BuiltModel


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a metric.

    Attributes:
      value: the figure that training curves show.
      figures: JSON-able; an entry of `results` in evaluate.json.
      line: the figures in one line of text, or the name and the value if that is not finite.
    """

    value: float
    figures: dict[str, Any]
    line: str


def check_finite(result: Result) -> Result:
    """The result. UserError if its value is not finite."""
    if not math.isfinite(result.value):
        raise UserError(
            f"{result.line}, although all weights are finite: activations overflow; evaluate an "
            "earlier step (--step=N), or with --config.model.dtype=float32"
        )
    return result


class Estimator(Protocol):
    """Computes a metric. It is called once per evaluation and compiles its programs once.

    Args:
      params: the weights. batches: global batches {"x": int32 [B, L], "valid": bool [B, L]}.
      split: the manifest's entry of the split. seed: seed of random draws.
      progress: a name for the progress bar, or None. total: number of batches, for the bar.
    """

    def __call__(
        self, params, batches, *, split: dict, seed: int, progress: str | None, total: int
    ) -> Result: ...


def always(config: Any) -> bool:
    """The metric applies to every config."""
    del config
    return True


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric, by the name that config.eval.metrics and config.train.metrics use.

    Attributes:
      make: (config, model, draws) → its estimator. draws: Monte-Carlo draws per window; None: those
        of config.eval.
      applies: config → whether the metric exists for it.
    """

    name: str
    make: Callable[[Any, BuiltModel, int | None], Estimator]
    applies: Callable[[Any], bool] = always
