"""The likelihood of the configured sampler as a metric: exact, or a bound.

The bound is of config.eval.num_samples draws of the sampler's orders; see sampler_likelihood.py.
"""

from collections.abc import Iterable, Iterator

from tqdm import tqdm

from esolm_jax.evaluation import bounds, sampler_likelihood
from esolm_jax.evaluation.metric import Metric, Result
from esolm_jax.evaluation.sampler_likelihood import SamplerLikelihood
from esolm_jax.parallel import multihost


def _rows(batches: Iterable[dict]) -> Iterator[list[list[int]]]:
    """The windows of each batch, without padding."""
    for batch in batches:
        pairs = zip(*multihost.to_host((batch["x"], batch["valid"])), strict=True)
        yield [x[valid].tolist() for x, valid in pairs if valid.any()]


def _make(config, built, draws: int | None):
    exact = sampler_likelihood.has_one_order(config)
    draws = 1 if exact else draws or config.eval.num_samples
    sampler_likelihood.check(config, draws)

    def run(params, batches, *, split, seed, progress=None, total=None) -> Result:
        scorer = SamplerLikelihood.of(config, built, params)
        shown = tqdm(
            batches, total=total, desc=progress, unit="batch", leave=False, disable=not progress
        )
        estimate = scorer.estimate(_rows(shown), num_orders=draws, seed=seed)
        bound = "sampler" if exact else "sampler_importance_weighted"
        settings = {"num_orders": None if exact else draws, "sample": config.sample.to_dict()}
        return bounds.result(bound, estimate, split, **settings)

    return run


SAMPLER = Metric("sampler", _make)
