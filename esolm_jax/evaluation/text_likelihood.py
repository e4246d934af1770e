"""Log-likelihoods of texts, each a window of its own."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from esolm_jax import config as config_lib
from esolm_jax.data import windows
from esolm_jax.data.tokenizer import Tokenizer
from esolm_jax.errors import UserError
from esolm_jax.evaluation import likelihood, sampler_likelihood
from esolm_jax.evaluation.sampler_likelihood import SamplerLikelihood
from esolm_jax.family.phase import is_exact
from esolm_jax.model import build
from esolm_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class LogLikelihood:
    """Estimated log-likelihoods of texts, in nats.

    Attributes:
      bound: "exact"; "nelbo" or "importance_weighted", whose expectation is a lower bound on the
        log-likelihood (see esolm_jax/evaluation/likelihood.py for the distribution of each).
      values: float64 [texts], nats of each text.
      num_tokens: int64 [texts], tokens of each text, EOS included.
      nll_per_token: −Σ values / Σ num_tokens.
      standard_error: Monte-Carlo standard error of `nll_per_token` for these texts; 0 if exact, NaN
        if a single draw leaves it unknown.
    """

    bound: str
    values: np.ndarray
    num_tokens: np.ndarray
    nll_per_token: float
    standard_error: float

    @classmethod
    def of(cls, estimate: likelihood.Estimate, bound: str) -> "LogLikelihood":
        """An estimate whose windows are the texts."""
        return cls(
            bound=bound,
            values=-estimate.window_nll,
            num_tokens=estimate.window_tokens,
            nll_per_token=estimate.nll,
            standard_error=estimate.standard_error,
        )


class TextLikelihood:
    """The estimators of a model's log-likelihoods, compiled on first use."""

    def __init__(self, config: ConfigDict, built: build.BuiltModel, tokenizer: Tokenizer):
        self._config, self._built, self._tokenizer = config, built, tokenizer

    def estimate(
        self, params: dict, texts: list[str], overrides: dict[str, config_lib.Setting]
    ) -> LogLikelihood:
        """Log-likelihoods of texts; `overrides`: seed, eval.num_samples, eval.num_orders.

        Raises:
          UserError: no texts, a text longer than data.seq_len, or a bound that the family lacks.
        """
        config = config_lib.overridden(self._config, overrides)
        config_lib.validate_evaluation(config, sharding.num_row_shards(self._built.mesh))
        batches = self._batches(self._windows(texts), config.eval.batch_size)
        exact, num_orders = is_exact(config), config.eval.num_orders
        if num_orders and not exact:
            bound = "importance_weighted"
            estimate = self._importance_weighted(
                params, batches, num_orders=num_orders, seed=config.seed
            )
        else:
            bound = "exact" if exact else "nelbo"
            estimate = self._nelbo(
                params, batches, num_samples=config.eval.num_samples, seed=config.seed
            )
        return LogLikelihood.of(estimate, bound)

    @functools.cached_property
    def _nelbo(self) -> Any:
        return likelihood.make_nelbo(self._config, self._built)

    @functools.cached_property
    def _importance_weighted(self) -> Any:
        return likelihood.make_importance_weighted(self._config, self._built)

    def _windows(self, texts: list[str]) -> list[list[int]]:
        length = self._config.data.seq_len
        if not texts:
            raise UserError("texts: must have at least one text")
        found = []
        for i, text in enumerate(texts):
            ids = self._tokenizer.encode(text)
            if len(ids) > length:
                raise UserError(
                    f"texts[{i}]: has {len(ids):,} tokens; must have at most data.seq_len={length}"
                )
            found.append(ids)
        return list(windows.pad(found, length, self._tokenizer.eos_id))

    def _batches(self, rows: list[list[int]], size: int) -> Iterator[dict]:
        """Global batches {"x", "valid"}, [size, L]; rows after the last text are padding."""
        for start in range(0, len(rows), size):
            x = np.full((size, self._config.data.seq_len), self._tokenizer.pad_id, np.int32)
            valid = np.zeros(x.shape, bool)
            for b, ids in enumerate(rows[start : start + size]):
                x[b, : len(ids)], valid[b, : len(ids)] = ids, True
            batch = {"x": x, "valid": valid}
            yield sharding.put_batch(batch, self._built.mesh, size)


def of_sampler(
    scorer: SamplerLikelihood,
    tokenizer: Tokenizer,
    texts: str | Sequence[str] | Sequence[Sequence[int]],
    num_orders: int,
) -> LogLikelihood:
    """Log-likelihoods of texts or token ids under a sampler, in batches of eval.batch_size; see
    sampler_likelihood.py."""
    config = scorer.config
    given, size = [texts] if isinstance(texts, str) else texts, config.eval.batch_size
    rows = [tokenizer.encode(text) if isinstance(text, str) else list(text) for text in given]
    batches = (rows[start : start + size] for start in range(0, len(rows), size))
    estimate = scorer.estimate(batches, num_orders=num_orders, seed=config.sample.seed)
    exact = sampler_likelihood.has_one_order(config)
    return LogLikelihood.of(estimate, "exact" if exact else "importance_weighted")
