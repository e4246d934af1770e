"""Parameters rounded to bfloat16 or float16, and what that changes: for `export --to=hub`."""

import dataclasses

import jax
import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.interop.export import parity, plain
from esolm_jax.sampling import generate
from esolm_jax.sampling.engine import network as network_lib
from esolm_jax.sampling.plan.canvas import Canvas
from esolm_jax.training import restore

DTYPES = ("bfloat16", "float16")
ROWS = 8  # drawn texts, whose perplexity is compared


def rounded(trained: restore.TrainedModel, dtype: str) -> restore.TrainedModel:
    """The model with float32 parameters that `dtype` holds exactly. UserError: one is too large."""

    def leaf(path, array):
        with np.errstate(over="ignore"):
            near = np.asarray(array).astype(np.dtype(dtype)).astype(np.float32)
        if not np.isfinite(near).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            largest = np.abs(np.asarray(array)).max()
            raise UserError(
                f"--dtype={dtype}: must hold all weights, but one of {name} is {largest:.3g}; "
                "choose bfloat16"
            )
        return near

    return dataclasses.replace(trained, params=jax.tree.map_with_path(leaf, trained.params))


def figures(config, exact: restore.TrainedModel, near: restore.TrainedModel) -> dict[str, float]:
    """max_logit_error on random tokens; perplexity_change, the relative change of the perplexity of
    texts that the exact model draws, and its standard error over texts.

    Args:
      config: its config.sample draws the texts by the plain loop.
    """
    model, special = exact.built.model, exact.built.special
    tokens = parity.examples(model, config.data.seq_len)[-1:]
    logits = [parity.trained_logits(model, which.params, tokens)[0] for which in (exact, near)]
    canvas = Canvas.empty(ROWS, config.sample.length, config.sample.seed)
    generator, log_p, text = generate.Generator.of(config, canvas, special), [], None
    for which in (exact, near):
        network = network_lib.fold(plain.in_float32(model), which.params)
        text = np.asarray(generator.run(network).text) if text is None else text
        log_p.append(generator.log_p(network, text).mean(axis=1))
    change = log_p[0] - log_p[1]
    return {
        "max_logit_error": float(np.abs(logits[0] - logits[1]).max()),
        "perplexity_change": float(np.expm1(change.mean())),
        "standard_error": float(change.std(ddof=1) / ROWS**0.5),
    }
