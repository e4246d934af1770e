"""The likelihood bounds as metrics: the NELBO and the importance-weighted bound."""

import math

from esolm_jax.evaluation import likelihood
from esolm_jax.evaluation.likelihood import Estimate
from esolm_jax.evaluation.metric import Metric, Result
from esolm_jax.family.phase import is_exact


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def _figures(bound: str, estimate: Estimate, split: dict, **settings) -> dict:
    """An estimate as perplexity and bits per token and byte. `split`: the manifest's entry."""
    bits = estimate.nll / math.log(2)
    is_whole = len(estimate.window_nll) == split["windows"]
    return {
        "bound": bound,
        "num_samples": None,
        "num_orders": None,
        **settings,
        "nll_per_token": estimate.nll,
        "standard_error": _finite(estimate.standard_error),
        "standard_error_differences": estimate.error_samples,
        "standard_error_note": _error_note(bound, estimate),
        "standard_error_of_split": None
        if is_whole
        else _finite(estimate.error_for(split["windows"])),
        "perplexity": estimate.perplexity,
        "bits_per_token": bits,
        "bits_per_byte": bits * split["tokens"] / split["bytes"],
        "bits_per_byte_note": "" if is_whole else "with the bytes per token of the whole split",
        "num_tokens": estimate.num_tokens,
    }


def _error_note(bound: str, estimate: Estimate) -> str:
    """The meaning of `standard_error`, or why it is missing."""
    if bound in ("exact", "sampler"):
        return "an exact likelihood"
    if math.isnan(estimate.standard_error):
        field = "eval.num_orders" if bound == "importance_weighted" else "eval.num_samples"
        return f"unknown from one draw of each window; set config.{field} to 2 or more"
    return "Monte Carlo: of other draws of noise for the same windows, in nats per token"


def _line(figures: dict) -> str:
    """A bound in one line; an error without a note is Monte Carlo noise."""
    text = f"{figures['bound']}: perplexity {figures['perplexity']:.2f}, "
    text += f"{figures['nll_per_token']:.4f} nats per token"
    if figures["standard_error"]:
        few = figures["standard_error_differences"]
        roughly = f", from {few} difference{'s' * (few > 1)}" if few < 10 else ""
        text += f" ± {figures['standard_error']:.4f} (Monte Carlo{roughly})"
    if figures["standard_error_of_split"]:
        text += f" ± {figures['standard_error_of_split']:.4f} (as a figure of the whole split)"
    about = "about " if figures["bits_per_byte_note"] else ""
    return text + f", {about}{figures['bits_per_byte']:.3f} bits per byte"


def result(bound: str, estimate: Estimate, split: dict, **settings) -> Result:
    """The figures of an estimate, with `settings` in them. `split`: the manifest's entry."""
    if not math.isfinite(estimate.nll):
        return Result(estimate.nll, {}, f"{bound}: is {estimate.nll}")
    figures = _figures(bound, estimate, split, **settings)
    return Result(estimate.nll, figures, _line(figures))


def _make_nelbo(config, model, draws: int | None):
    estimate = likelihood.make_nelbo(config, model)
    exact = is_exact(config)
    draws = 1 if exact else draws or config.eval.num_samples
    bound = "exact" if exact else "nelbo"

    def run(params, batches, *, split, seed, progress=None, total=None) -> Result:
        drawn = estimate(
            params, batches, num_samples=draws, seed=seed, progress=progress, total=total
        )
        return result(bound, drawn, split, num_samples=draws)

    return run


def _make_importance_weighted(config, model, draws: int | None):
    estimate = likelihood.make_importance_weighted(config, model)
    num_orders = draws or config.eval.num_orders

    def run(params, batches, *, split, seed, progress=None, total=None) -> Result:
        drawn = estimate(
            params, batches, num_orders=num_orders, seed=seed, progress=progress, total=total
        )
        return result("importance_weighted", drawn, split, num_orders=num_orders)

    return run


def _has_orders(config) -> bool:
    return bool(config.eval.num_orders) and not is_exact(config)


NELBO = Metric("nelbo", _make_nelbo)
IMPORTANCE_WEIGHTED = Metric("importance_weighted", _make_importance_weighted, _has_orders)
