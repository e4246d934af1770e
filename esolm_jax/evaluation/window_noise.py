"""Bounds whose noise belongs to the windows, so that batch size and mesh do not change a figure.

Window i of a split has its own keys, for masks and orders. Its time comes from a stratum of its own
in a group of GROUP consecutive windows: times cover all noise levels evenly, as in the batches of
32 of the published evaluation. `likelihood` draws the noise of the same bounds batch by batch.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.evaluation.likelihood import (
    Estimate,
    bound_phases,
    counted_batches,
    labelled_nll,
    log_mean_exp,
    on_kept_queries,
)
from esolm_jax.family import eso_b
from esolm_jax.family.labels import LabelledBatch
from esolm_jax.family.phase import is_exact, make_phases
from esolm_jax.model.build import BuiltModel
from esolm_jax.parallel import multihost, sharding
from esolm_jax.process import prng

GROUP = 32


def time_offset(key: jax.Array, window: jax.Array) -> jax.Array:
    """The offset of a window's time, uniform in [0, 1): a stratum of its group, and one shift for
    all of the group."""
    key_shift, key_deal = jax.random.split(jax.random.fold_in(key, window // GROUP))
    stratum = jax.random.permutation(key_deal, GROUP)[window % GROUP]
    return (jax.random.uniform(key_shift) + stratum) / GROUP


def label_rows(label: Callable[..., LabelledBatch], *per_row: jax.Array) -> LabelledBatch:
    """The rows that `label(*arguments)` labels, each from its own arguments; [B, …] in per_row."""

    def one(*arguments):
        labelled = label(*arguments)
        return jax.tree.map(lambda a: a[0], labelled)

    return jax.vmap(one)(*per_row)


def labelled_phases(
    config, built: BuiltModel, key: jax.Array, offset_B: jax.Array, window_B, x, valid
) -> list[LabelledBatch]:
    """The labelled batch of each phase, for one draw of noise.

    Args:
      key: of the draw; window_B: int32 [B], numbers of the windows, which their noise depends on.
      offset_B: float32 [B], offsets of their times.
    """
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(window_B)
    phases = make_phases(config, built.special, low_variance=False)

    def labelled(i: int) -> LabelledBatch:
        def label(row_key, u, row_x, row_valid):
            phase = make_phases(config, built.special, low_variance=False, time_offset=u)[i]
            return phase.label(jax.random.fold_in(row_key, i), row_x[None], row_valid[None])

        return label_rows(label, keys_B, offset_B, x, valid)

    return [labelled(i) for i in range(len(phases))]


def phase_nll(
    config, built: BuiltModel, params, key: jax.Array, offset_B: jax.Array, window_B, x, valid
) -> jax.Array:
    """One draw of each phase's part of the NELBO of each row: float32 [phases, B]. Arguments are
    those of labelled_phases."""
    batches = labelled_phases(config, built, key, offset_B, window_B, x, valid)
    phases = bound_phases(config, built.special)
    nll = functools.partial(labelled_nll, built.apply, built.head, params)
    pairs = zip(phases, batches, strict=True)
    return jnp.stack([on_kept_queries(nll, *pair, built.mesh) for pair in pairs])


def noise_of(key: jax.Array, first: Any, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(key of the rows, offset_B, window_B) of the windows [first, first + rows) in the draw of
    `key`, as labelled_phases takes them."""
    key_time, key_rows = jax.random.split(key)
    window_B = first + jnp.arange(rows)
    return key_rows, jax.vmap(functools.partial(time_offset, key_time))(window_B), window_B


def compiled(draw: Callable, built: BuiltModel) -> Callable:
    """`draw` of (params, key, number, x, valid) as one program of all processes; replicated."""
    rows, everywhere = sharding.rows(built.mesh), sharding.replicated(built.mesh)
    shardings = (None, None, None, rows, rows)
    return multihost.together(jax.jit(draw, in_shardings=shardings, out_shardings=everywhere))


def _estimate(values_DN: np.ndarray, tokens_N: np.ndarray, variance: float, samples: int):
    """The estimate from draws of each window's nats. Windows without tokens are padding."""
    is_real = tokens_N > 0
    window_nll, total = values_DN.mean(axis=0)[is_real], int(tokens_N.sum())
    return Estimate(
        nll=window_nll.sum() / total,
        standard_error=math.sqrt(variance) / total,
        num_tokens=total,
        error_samples=samples,
        window_nll=window_nll,
        window_tokens=tokens_N[is_real],
    )


def nelbo_estimate(values_DN: np.ndarray, tokens_N: np.ndarray, exact: bool) -> Estimate:
    """The estimate from draws of the NELBO of consecutive windows, from the first on.

    Args:
      values_DN: float64 [draws, windows], nats. tokens_N: int64 [windows], real tokens; 0: padding.
    """
    draws = len(values_DN)
    if draws == 1:
        return _estimate(values_DN, tokens_N, 0.0 if exact else math.nan, 0)
    starts = np.arange(0, int((tokens_N > 0).sum()), GROUP)
    sums_DG = np.add.reduceat(values_DN[:, tokens_N > 0], starts, axis=1)
    variance = float((sums_DG.var(axis=0, ddof=1) / draws).sum())
    return _estimate(values_DN, tokens_N, variance, len(starts) * (draws - 1))


def make_nelbo(config, built: BuiltModel) -> Callable[..., Estimate]:
    """Returns estimate(params, batches, *, num_samples, seed, …) → Estimate of the NELBO.

    The error is that of `num_samples` draws of each group of windows, whose times are stratified.
    """
    exact = is_exact(config)

    def draw(params, key, first, x, valid):
        noise = noise_of(key, first, x.shape[0])
        return phase_nll(config, built, params, *noise, x, valid).sum(axis=0)

    run = compiled(draw, built)

    def estimate(params, batches, *, num_samples: int, seed: int, progress=None, total=None):
        draws = 1 if exact else num_samples
        keys = jax.random.split(prng.key(seed), draws)
        values_DN, tokens_N = _values(run, keys, built, params, batches, progress, total)
        return nelbo_estimate(values_DN, tokens_N, exact)

    return estimate


def make_importance_weighted(config, built: BuiltModel) -> Callable[..., Estimate]:
    """Returns estimate(params, batches, *, num_orders, seed, …) → Estimate of the
    importance-weighted bound, as likelihood.make_importance_weighted."""
    label = functools.partial(eso_b.any_order, alpha_0=config.alpha_0, special=built.special)

    def draw(params, key, first, x, valid):
        window_B = first + jnp.arange(x.shape[0])
        keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(window_B)
        labelled = label_rows(lambda k, a, b: label(k, a[None], b[None]), keys_B, x, valid)
        return -labelled_nll(built.apply, built.head, params, labelled)

    run = compiled(draw, built)

    def estimate(params, batches, *, num_orders: int, seed: int, progress=None, total=None):
        keys = jax.random.split(prng.key(seed), num_orders)
        log_p_ON, tokens_N = _values(run, keys, built, params, batches, progress, total)
        log_mean, variance = log_mean_exp(log_p_ON.T)
        is_real = tokens_N > 0
        samples = int(is_real.sum()) * (num_orders - 1)
        return _estimate(-log_mean[None], tokens_N, float(variance[is_real].sum()), samples)

    return estimate


def _values(
    run: Callable, keys: jax.Array, built: BuiltModel, params, batches: Any, progress, total
) -> tuple[np.ndarray, np.ndarray]:
    """run(params, key, first, x, valid) of all keys and batches: float64 [keys, N], and the real
    tokens of each window, int64 [N]; rows that pad the last batch have none."""
    values, tokens, first = [], [], 0
    for _, count, batch in counted_batches(batches, built.mesh, progress, total):
        x, valid = batch["x"], batch["valid"]
        drawn = [np.asarray(run(params, key, np.int32(first), x, valid)) for key in keys]
        values.append(np.array(drawn, np.float64))
        tokens.append(count)
        first += len(count)
    return np.concatenate(values, axis=1), np.concatenate(tokens)
