"""Fields of config.eval."""

import functools

from esolm_jax.config.checks import MAX_DRAWS, ListOf, OneOf, at_least, count, size
from esolm_jax.config.field import Field
from esolm_jax.data.sources import SPLITS

WEIGHTS = ("ema", "raw")
# In evaluation/metrics.py, which can register more.
METRICS = ["nelbo", "importance_weighted", "sampler"]

_field = functools.partial(Field, may_change_on_resume=True)

EVAL = {
    "split": _field("test", "Split to evaluate on.", OneOf(SPLITS)),
    "batch_size": _field(64, "Windows per batch.", size(1)),
    "max_windows": _field(0, "Number of windows; 0 = the whole split.", count(0)),
    "num_samples": _field(2, "Monte-Carlo draws of noise per window, for the NELBO.",
                         at_least(1, MAX_DRAWS)),
    "num_orders": _field(0, "Orders K of the importance-weighted bound; 0 = omit it.",
                        at_least(0, MAX_DRAWS)),
    "metrics": _field("nelbo,importance_weighted", "Metrics, comma-separated.", ListOf(METRICS),
                      before="nelbo,importance_weighted"),
    "weights": _field("ema", "Which weights to evaluate.", OneOf(WEIGHTS)),
}  # fmt: skip
