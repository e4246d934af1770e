"""Likelihood bounds: the NELBO by Monte Carlo, and the importance-weighted any-order bound.

All values are in nats; estimates are per real (not padding) token.

What each figure bounds, for a text x:

- Importance-weighted bound of K orders, Eso-LM (B): −log p(x), p(x) = E_σ p_σ(x) the likelihood of
  sampling one token per step, each given only the known tokens. By Jensen's inequality its
  expectation is at least −log p(x), for every x and K, and does not rise with K.
- NELBO of MDLM and BD3-LM: −log p(x) of sampling one token per step with the rest of the canvas (of
  the block) as masks.
- NELBO of Eso-LM (A and B): −log p′(x) of another sampler, with the whole canvas: every diffusion
  step draws a new order of known tokens and masks, a mask reads the masks before it, and one token
  is revealed. p′ = p at α₀ = 0, where there is one order. At α₀ > 0, the NELBO and the
  importance-weighted bound bound two distributions, and either can be the larger one: for a single
  text, on average over texts, or at K = 1.

Diffusion bounds exclude the ends of time, a fraction ε = 1e-3 of the noise levels (noise.EPS).
"""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from esolm_jax.family import eso_b, trim
from esolm_jax.family.labels import LabelledBatch
from esolm_jax.family.phase import Phase, SpecialIds, is_exact, make_phases
from esolm_jax.model.build import BuiltModel
from esolm_jax.model.lm_head import Head, sequence_nll
from esolm_jax.parallel import distributed, multihost, sharding
from esolm_jax.process import prng


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A Monte-Carlo estimate of a bound on the NLL of given windows.

    Attributes:
      nll: nats per token.
      standard_error: Monte Carlo error of `nll` on the *same* windows (0 for an exact
        likelihood, NaN for a single draw).
      num_tokens: real tokens evaluated.
      error_samples: independent differences between draws from which the error is estimated; the
        relative error of that estimate is about 1/√(2 error_samples).
      window_nll: nats of each window, float64 [windows].
      window_tokens: real tokens of each window, int64 [windows].
    """

    nll: float
    standard_error: float
    num_tokens: int
    error_samples: int
    window_nll: np.ndarray
    window_tokens: np.ndarray

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else self.nll * math.inf

    def error_for(self, num_windows: int) -> float:
        """Standard error of `nll` as an estimate for a set of `num_windows` windows, of which these
        are a random part: the choice of the windows and the Monte-Carlo noise. NaN for one window.
        """
        count = len(self.window_nll)
        if count < 2:
            return math.nan
        residual = self.window_nll - self.nll * self.window_tokens
        among_windows = count / (count - 1) * (residual**2).sum() / self.num_tokens**2
        noise = 0.0 if math.isnan(self.standard_error) else self.standard_error**2
        of_choice = max(0.0, among_windows - noise) * (1 - count / num_windows)
        return math.sqrt(of_choice + noise)


def labelled_nll(apply, head: Head, params, labelled):
    """Σ weight · (−log p) of each row: float32 [B]."""
    predicted = (0, labelled.target.shape[1])
    hidden = apply(params, labelled.tokens, predict=predicted, head=False)
    target, weight = (labelled.target,), (labelled.weight,)
    return sequence_nll(head, (hidden,), params["logits"], target, weight)[0]


def bound_phases(config, special: SpecialIds) -> tuple[Phase, ...]:
    """The phases of a bound. With packing=pad, padding follows the predicted tokens, so that query
    copies cannot be trimmed."""
    phases = make_phases(config, special, low_variance=False)
    if config.data.packing != "pad":
        return phases
    return tuple(dataclasses.replace(phase, can_trim_queries=False) for phase in phases)


def on_kept_queries(run, phase: Phase, labelled: LabelledBatch, mesh):
    """run(labelled), without the query copies that reach no loss; mesh: None = one device."""
    rows, length = labelled.target.shape
    queries = trim.kept_queries(phase, length, rows, mesh)
    return trim.trimmed_if_fits(run, labelled, queries)


def nelbo(apply, phases, head: Head, params, key, x, valid):
    """One draw of the NELBO of each row: float32 [B]. Every row goes through every phase."""
    nll = functools.partial(labelled_nll, apply, head, params)
    total = jnp.zeros(x.shape[0])
    for i, phase in enumerate(phases):
        labelled = phase.label(jax.random.fold_in(key, i), x, valid)
        total += on_kept_queries(nll, phase, labelled, head.spec.mesh)
    return total


def any_order_log_p(apply, label, head: Head, params, keys_O, x, valid):
    """log p_σ(x) of each row under one random order per key: float32 [B, O]."""

    def one(key):
        return -labelled_nll(apply, head, params, label(key, x, valid))

    return jax.lax.map(one, keys_O).T


def log_mean_exp(log_p_BO: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log mean_k exp over the last axis, and an estimate of its variance (NaN if K = 1).

    The variance is the jackknife's: the spread of the K values that leave one order out, summed. By
    the Efron-Stein inequality its expectation is at least the variance with K − 1 orders, for any
    tails of p. The delta method is not: log p varies by many nats over orders, one order
    carries most of the mean, and the delta method's variance is below 1 nat² then.
    """
    orders = log_p_BO.shape[1]
    total = _logsumexp(log_p_BO)
    if orders == 1:
        return total, np.full(len(log_p_BO), np.nan)
    falling = -np.sort(-log_p_BO, axis=1)
    # Sums without the largest term are recomputed, because a difference would cancel.
    without_others = total[:, None] + np.log1p(-np.exp(falling[:, 1:] - total[:, None]))
    left_out = np.concatenate([_logsumexp(falling[:, 1:])[:, None], without_others], axis=1)
    return total - math.log(orders), left_out.var(axis=1) * orders


def _logsumexp(a_BO: np.ndarray) -> np.ndarray:
    top = a_BO.max(axis=1, keepdims=True)
    return np.log(np.exp(a_BO - top).sum(axis=1)) + top[:, 0]


@functools.cache
def _count(mesh):
    in_each_row = functools.partial(jnp.sum, axis=1)
    return multihost.together(jax.jit(in_each_row, out_shardings=sharding.replicated(mesh)))


def counted_batches(batches: Iterable[dict], mesh, progress: str | None, total: int | None):
    """Global batches with their number and the real tokens of each row, over all processes."""
    count = _count(mesh)
    shown = tqdm(
        batches,
        total=total,
        desc=progress,
        unit="batch",
        leave=False,
        disable=not (progress and distributed.is_main()),
    )
    for i, batch in enumerate(shown):
        yield i, np.asarray(count(batch["valid"]), np.int64), batch


def _estimate(
    nll: float, rows: list, tokens: list, variance: float, error_samples: int
) -> Estimate:
    """`rows`, `tokens`: nats [B] and real tokens [B] of each batch; rows without any are
    padding."""
    window_nll, window_tokens = np.concatenate(rows), np.concatenate(tokens)
    total = int(window_tokens.sum())
    is_real = window_tokens > 0
    return Estimate(
        nll=nll / total,
        standard_error=math.sqrt(variance) / total,
        num_tokens=total,
        error_samples=error_samples,
        window_nll=window_nll[is_real],
        window_tokens=window_tokens[is_real],
    )


def _compiled(draw, built: BuiltModel):
    """`draw` of (params, keys, x, valid) as one program of all processes; replicated results."""
    rows = sharding.rows(built.mesh)
    everywhere = sharding.replicated(built.mesh)
    jitted = jax.jit(draw, in_shardings=(None, None, rows, rows), out_shardings=everywhere)
    return multihost.together(jitted)


def make_nelbo(config, built: BuiltModel):
    """Returns estimate(params, batches, *, num_samples, seed, …) → Estimate of the NELBO.

    `num_samples` draws of noise per window; the error is estimated from their spread, batch by
    batch, since times are stratified within a batch. One draw suffices where
    the NELBO is exact (is_exact). Batches are global: {"x", "valid"}, [B, L].
    """
    phases = bound_phases(config, built.special)
    exact = is_exact(config)
    draw = _compiled(functools.partial(nelbo, built.apply, phases, built.head), built)

    def estimate(params, batches, *, num_samples: int, seed: int, progress=None, total=None):
        draws = 1 if exact else num_samples
        nll = variance = 0.0
        rows, tokens = [], []
        for i, count, batch in counted_batches(batches, built.mesh, progress, total):
            keys = jax.random.split(jax.random.fold_in(prng.key(seed), i), draws)
            drawn = np.array(
                [
                    np.asarray(draw(params, key, batch["x"], batch["valid"]), np.float64)
                    for key in keys
                ]
            )
            sums = drawn.sum(axis=1)
            nll += sums.mean()
            rows.append(drawn.mean(axis=0))
            variance += sums.var(ddof=1) / draws if draws > 1 else (0.0 if exact else np.nan)
            tokens.append(count)
        return _estimate(nll, rows, tokens, variance, len(rows) * (draws - 1))

    return estimate


def make_importance_weighted(config, built: BuiltModel):
    """Returns estimate(params, batches, *, num_orders, seed, …) → Estimate of the
    importance-weighted bound −log mean_k p_σk(x), for eso_b at any α₀.

    Every window draws its own orders, so the variances of windows add up. The error is that of the
    bound with this K, not its distance to the likelihood, which it exceeds in expectation."""
    label = functools.partial(eso_b.any_order, alpha_0=config.alpha_0, special=built.special)
    draw = _compiled(functools.partial(any_order_log_p, built.apply, label, built.head), built)

    def estimate(params, batches, *, num_orders: int, seed: int, progress=None, total=None):
        nll = variance = 0.0
        rows, tokens = [], []
        for i, count, batch in counted_batches(batches, built.mesh, progress, total):
            keys = jax.random.split(jax.random.fold_in(prng.key(seed), i), num_orders)
            log_p = np.asarray(draw(params, keys, batch["x"], batch["valid"]), np.float64)
            log_mean, spread = log_mean_exp(log_p)
            nll -= log_mean.sum()
            rows.append(-log_mean)
            variance += spread.sum()
            tokens.append(count)
        windows = sum(int((count > 0).sum()) for count in tokens)
        return _estimate(nll, rows, tokens, variance, windows * (num_orders - 1))

    return estimate
