"""Parameters rounded to bfloat16 or float16, and what that changes: for `export --to=hub`."""

import dataclasses

import jax
import numpy as np

from esolm_jax.interop import weight_types
from esolm_jax.interop.export import parity, plain
from esolm_jax.sampling import generate
from esolm_jax.sampling.engine import network as network_lib
from esolm_jax.sampling.plan.canvas import Canvas
from esolm_jax.training import restore

DTYPES = ("bfloat16", "float16")
ROWS = 8  # drawn texts, whose perplexity is compared


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of a set of weights: logits of random tokens; texts int32 [B, L], and float32 [B], the mean
    log-probability of their tokens."""

    logits: np.ndarray
    text: np.ndarray
    log_p: np.ndarray


def round_in_place(params: dict, dtype: str, path: str = "") -> None:
    """Replaces the float32 arrays of a nested dict by float32 arrays that `dtype` holds exactly.
    UserError: a weight is too large for it."""
    for name, value in params.items():
        if isinstance(value, dict):
            round_in_place(value, dtype, f"{path}{name}/")
        else:
            near = weight_types.rounded(np.asarray(value), dtype, f"{path}{name}")
            params[name] = near.astype(np.float32)


def measure(config, trained: restore.TrainedModel, text: np.ndarray | None = None) -> Measured:
    """Of these texts, by default of texts that the model draws.

    Args:
      config: its config.sample draws the texts, by the plain loop without filters.
    """
    model, special = trained.built.model, trained.built.special
    tokens = parity.examples(model, config.data.seq_len)[-1:]
    (logits,) = parity.trained_logits(model, trained.params, tokens)
    canvas = Canvas.empty(ROWS, config.sample.length, config.sample.seed)
    generator = generate.Generator.of(config, canvas, special)
    network = network_lib.fold(plain.in_float32(model), trained.params)
    text = np.asarray(generator.run(network).text) if text is None else text
    return Measured(logits, text, generator.log_p(network, text).mean(axis=1))


def figures(exact: Measured, near: Measured) -> dict[str, float]:
    """max_logit_error; perplexity_change, the relative change of the perplexity of texts that the
    exact model draws, and its standard error over texts."""
    change = exact.log_p - near.log_p
    return {
        "max_logit_error": float(np.abs(exact.logits - near.logits).max()),
        "perplexity_change": float(np.expm1(change.mean())),
        "standard_error": float(change.std(ddof=1) / len(change) ** 0.5),
    }


def rounded(config, trained: restore.TrainedModel, dtype: str) -> dict[str, float]:
    """Rounds the parameters of `trained` in place, one array at a time. Returns figures().

    Args:
      config: as of measure.

    Raises UserError: a weight is too large for the type.
    """
    exact = measure(config, trained)
    jax.clear_caches()
    round_in_place(trained.params, dtype)
    return figures(exact, measure(config, trained, exact.text))
