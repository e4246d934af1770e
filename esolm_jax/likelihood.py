"""Likelihood bounds: the NELBO by Monte Carlo, and the importance-weighted any-order bound.

Everything here is in nats; estimates are per real (not padding) token.

The importance-weighted bound is one on the likelihood of sampling one token per step. So is the
NELBO of AR and MDLM. The diffusion NELBO of Eso-LM is that of its parallel steps, where masks see
the masks before them, as in training: on average over texts it lies above, for a single text it
need not.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from esolm_jax import distributed, objectives, sharding
from esolm_jax.assemble import Built
from esolm_jax.loss import Head, sequence_nll


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A Monte-Carlo estimate of a bound on the NLL.

    Attributes:
      nll: nats per token.
      standard_error: of `nll`, from the Monte-Carlo noise alone (0 for an exact likelihood, NaN
        when one draw leaves it unknown).
      num_tokens: real tokens evaluated.
    """

    nll: float
    standard_error: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)


def labelled_nll(apply, head: Head, params, labelled):
    """Σ weight · (−log p) of each row: float32 [B]."""
    at = (0, labelled.target.shape[1])
    hidden = apply(params, labelled.tokens, predict=at, head=False)
    target, weight = (labelled.target,), (labelled.weight,)
    return sequence_nll(head, (hidden,), params["logits"], target, weight)[0]


def nelbo(apply, phases, head: Head, params, key, x, valid):
    """One draw of the NELBO of each row: float32 [B]. Every row goes through every phase."""
    total = jnp.zeros(x.shape[0])
    for i, phase in enumerate(phases):
        labelled = phase.label(jax.random.fold_in(key, i), x, valid)
        total += labelled_nll(apply, head, params, labelled)
    return total


def any_order_log_p(apply, label, head: Head, params, keys_O, x, valid):
    """log p_σ(x) of each row under one random order per key: float32 [B, O]."""

    def one(key):
        return -labelled_nll(apply, head, params, label(key, x, valid))

    return jax.lax.map(one, keys_O).T


def log_mean_exp(log_p_BO: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log mean_k exp over the last axis, and its variance by the delta method (NaN if K = 1)."""
    top = log_p_BO.max(axis=1, keepdims=True)
    p = np.exp(log_p_BO - top)
    orders = p.shape[1]
    mean = p.mean(axis=1)
    spread = p.var(axis=1, ddof=1) if orders > 1 else np.full(len(p), np.nan)
    return np.log(mean) + top[:, 0], spread / orders / mean**2


def _batches(batches: Iterable[dict], mesh, progress: str | None, total: int | None):
    """Global batches with their number and their count of real tokens, over all processes."""
    count = jax.jit(jnp.sum, out_shardings=sharding.replicated(mesh))
    shown = tqdm(
        batches,
        total=total,
        desc=progress,
        unit="batch",
        leave=False,
        disable=not (progress and distributed.is_main()),
    )
    for i, batch in enumerate(shown):
        yield i, int(count(batch["valid"])), batch


def make_nelbo(config, built: Built):
    """Returns estimate(params, batches, *, num_samples, seed, …) → Estimate of the NELBO.

    `num_samples` draws of noise per window; the error is estimated from their spread, batch by
    batch, since times are stratified within a batch. Where the NELBO is exact
    (objectives.is_exact), one draw is all. Batches are global: {"x", "valid"}, [B, L].
    """
    phases = objectives.phases(config, built.special, low_variance=False)
    exact = objectives.is_exact(config)
    rows = sharding.rows(built.mesh)
    draw = jax.jit(
        functools.partial(nelbo, built.apply, phases, built.head),
        in_shardings=(None, None, rows, rows),
        out_shardings=sharding.replicated(built.mesh),
    )

    def estimate(params, batches, *, num_samples: int, seed: int, progress=None, total=None):
        draws = 1 if exact else num_samples
        nll = variance = 0.0
        tokens = 0
        for i, count, batch in _batches(batches, built.mesh, progress, total):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), i), draws)
            sums = np.array(
                [
                    np.asarray(draw(params, key, batch["x"], batch["valid"]), np.float64).sum()
                    for key in keys
                ]
            )
            nll += sums.mean()
            variance += sums.var(ddof=1) / draws if draws > 1 else (0.0 if exact else np.nan)
            tokens += count
        return Estimate(nll / tokens, math.sqrt(variance) / tokens, tokens)

    return estimate


def make_importance_weighted(config, built: Built):
    """Returns estimate(params, batches, *, num_orders, seed, …) → Estimate of the
    importance-weighted bound −log mean_k p_σk(x), for eso_b at any α₀."""
    label = functools.partial(objectives.any_order, alpha_0=config.alpha_0, special=built.special)
    rows = sharding.rows(built.mesh)
    draw = jax.jit(
        functools.partial(any_order_log_p, built.apply, label, built.head),
        in_shardings=(None, None, rows, rows),
        out_shardings=sharding.replicated(built.mesh),
    )

    def estimate(params, batches, *, num_orders: int, seed: int, progress=None, total=None):
        nll = variance = 0.0
        tokens = 0
        for i, count, batch in _batches(batches, built.mesh, progress, total):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), i), num_orders)
            log_p = np.asarray(draw(params, keys, batch["x"], batch["valid"]), np.float64)
            log_mean, spread = log_mean_exp(log_p)
            nll -= log_mean.sum()
            variance += spread.sum()
            tokens += count
        return Estimate(nll / tokens, math.sqrt(variance) / tokens, tokens)

    return estimate
