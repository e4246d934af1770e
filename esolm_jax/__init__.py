"""Esoteric Language Models in JAX: masked diffusion and autoregression with one attention rule.

    load(workdir) → LanguageModel              .logits  .sample  .log_likelihood
    load_published(weights, num_heads)         a model from weights of the published implementation

docs/python_api.md has examples. ARCHITECTURE.md is the map of the package: the attention rule,
the data flow, the layers, the legend of shape suffixes.
"""

import importlib
import typing

from esolm_jax.process import startup

if typing.TYPE_CHECKING:
    from esolm_jax.language_model import LanguageModel, LogLikelihood, load, load_published

__version__ = "0.1.0"
__all__ = ["LanguageModel", "LogLikelihood", "load", "load_published"]

if startup.is_verb():
    startup.begin()


def __getattr__(name: str) -> typing.Any:
    """Imports the API, and with it JAX, on first use: `import esolm_jax` alone is fast."""
    if name in __all__:
        return getattr(importlib.import_module("esolm_jax.language_model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
