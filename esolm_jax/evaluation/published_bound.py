"""The NELBO by the published protocol: Eso-LM's batches are split by κ (--protocol=published).

The first ⌊κ · rows⌋ rows of each evaluation batch feed the diffusion term, the others the
sequential term; `protocol/published_nelbo.py` has the sums. Times are stratified over the diffusion
rows. Other families, and α₀ = 0 or 1, have one term of all rows. The first token of a window is
not predicted by AR that was trained without a start token (config.start_token=none), and by BD3-LM,
whose code also has another weight (protocol/published_nelbo.py). One draw per window. Figures
depend on the batch size, and on which windows share a batch: the published code shuffles windows by
a PyTorch generator, these batches are in order.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.evaluation.likelihood import counted_batches, labelled_nll
from esolm_jax.evaluation.metric import Result
from esolm_jax.evaluation.protocol import published_nelbo
from esolm_jax.evaluation.protocol.published_nelbo import (
    BatchNelbo,
    diffusion_rows,
    label_ar,
    nelbo_figures,
)
from esolm_jax.evaluation.window_noise import compiled, phase_nll
from esolm_jax.family import bd3, registry
from esolm_jax.family.labels import LabelledBatch
from esolm_jax.family.phase import is_exact
from esolm_jax.model.build import BuiltModel
from esolm_jax.process import prng


def kappa_of(config) -> float:
    """The share of a batch that feeds the diffusion term."""
    if not registry.get(config.objective).has_two_phases:
        return 0.0 if is_exact(config) else 1.0
    return {0.0: 0.0, 1.0: 1.0}.get(config.alpha_0, config.kappa)


def check_batches(config, num_windows: int) -> None:
    """UserError if no row of the last batch would feed the diffusion term, on which the published
    code fails, too."""
    rest = num_windows % config.eval.batch_size or min(num_windows, config.eval.batch_size)
    try:
        diffusion_rows(rest, kappa_of(config))
    except UserError as error:
        raise UserError(
            f"config.eval.batch_size={config.eval.batch_size}: leaves a last batch of {rest} of "
            f"{num_windows:,} windows, with no row for the diffusion term at config.kappa="
            f"{config.kappa} (the published code fails there); choose another batch size"
        ) from error


def make(config, built: BuiltModel) -> Callable[..., Result]:
    """Returns estimate(params, batches, *, split, seed, progress, total) → Result, as a metric."""
    kappa = kappa_of(config)
    label = _other_label(config, built)

    def draw(params, key, num_diffusion, x, valid):
        if label:
            labelled = label(key, num_diffusion, x, valid)
            return labelled_nll(built.apply, built.head, params, labelled)[None]
        key_time, key_rows = jax.random.split(key)
        row_B = jnp.arange(x.shape[0])
        shift = jax.random.uniform(key_time)
        offset_B = (shift + row_B) / jnp.maximum(num_diffusion, 1) % 1.0
        return phase_nll(config, built, params, key_rows, offset_B, row_B, x, valid)

    run = compiled(draw, built)

    def estimate(params, batches, *, split: dict, seed: int, progress=None, total=None) -> Result:
        del split
        sums, windows = [], 0
        for i, count, batch in counted_batches(batches, built.mesh, progress, total):
            rows = int((count > 0).sum())
            first = diffusion_rows(rows, kappa)
            key = jax.random.fold_in(prng.key(seed), i)
            drawn = run(params, key, np.int32(first or rows), batch["x"], batch["valid"])
            scored = count - (count > 0) if label else count
            sums.append(batch_sums(np.asarray(drawn, np.float64), scored, first))
            windows += rows
        return _result(sums, windows, kappa, is_exact(config))

    return estimate


def _other_label(config, built: BuiltModel) -> Callable[..., LabelledBatch] | None:
    """(key, rows, x, valid) → the labelled batch of published code that does not score the first
    token of a window: AR without a start token, and BD3-LM. None: the family's own phases."""
    family = registry.get(config.objective)
    if family.is_shifted and config.start_token == "none":
        return lambda key, rows, x, valid: _label_without_start(x, valid)
    if config.objective != bd3.FAMILY.name:
        return None
    settings = {"mask": built.special.mask, "block_length": config.block_length}

    def label(key, rows, x, valid):
        del valid
        masked, t_BL = published_nelbo.draw_bd3(key, rows, x.shape, config.block_length)
        return published_nelbo.label_bd3(x, masked, t_BL, **settings)

    return label


def _label_without_start(x: jax.Array, valid: jax.Array) -> LabelledBatch:
    """All tokens but the first, each predicted from those before it. [B, L], as of other labels:
    the prediction after the last token has no weight."""
    longer = jnp.concatenate([x, x[:, -1:]], axis=1)
    scored = jnp.concatenate([valid[:, 1:], jnp.zeros_like(valid[:, :1])], axis=1)
    return label_ar(longer, None).replace(weight=scored.astype(jnp.float32))


def batch_sums(nll_PB: np.ndarray, count_B: np.ndarray, first: int) -> BatchNelbo:
    """The sums of a batch: its `first` rows feed the first phase, the others the last.

    Args:
      nll_PB: float64 [phases, B], nats. count_B: int64 [B], scored tokens; 0: padding.
    """
    diffusion, sequential = nll_PB[0][:first], nll_PB[-1][first:]
    counts = int(count_B[:first].sum()), int(count_B[first:].sum())
    sequential = sequential[count_B[first:] > 0]
    return BatchNelbo(float(diffusion.sum()), counts[0], float(sequential.sum()), counts[1])


def _result(batches: list[BatchNelbo], windows: int, kappa: float, exact: bool) -> Result:
    values = nelbo_figures(batches)
    error = 0.0 if exact else error_over_batches(batches, values["nll"])
    figures = {
        "bound": "exact" if exact else "published_nelbo",
        "num_samples": 1,
        "kappa": kappa,
        "nll_per_token": values["nll"],
        "standard_error": None if math.isnan(error) else error,
        "standard_error_note": "an exact likelihood"
        if exact
        else "of batches: of other windows and other noise, in nats per token",
        "perplexity": values["perplexity"],
        "bits_per_token": values["bits_per_token"],
        "num_tokens": sum(b.diffusion_tokens + b.sequential_tokens for b in batches),
        "windows": windows,
    }
    text = "unknown from one batch" if math.isnan(error) else f"{error:.4f}"
    line = f"{figures['bound']}: perplexity {values['perplexity']:.2f}, {values['nll']:.4f} "
    return Result(values["nll"], figures, line + f"nats per token ± {text} (over batches)")


def error_over_batches(batches: list[BatchNelbo], nll: float) -> float:
    """Standard error of `nll`, the weighted mean over batches; NaN for one batch.

    Its square is unbiased if the variance of a batch is inverse to its tokens. The scale is
    n / (n - 1) for n equal batches, and larger with a short last one, which says little of the
    others.
    """
    if len(batches) < 2:
        return math.nan
    weight = np.array([batch.num_tokens for batch in batches], np.float64)
    share = weight / weight.sum()
    residual = share * np.array([batch.loss - nll for batch in batches])
    return math.sqrt((residual**2).sum() / (1 - (share**2).sum()))
