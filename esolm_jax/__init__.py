"""Esoteric Language Models in JAX: masked diffusion and autoregression with one attention rule.

See ARCHITECTURE.md: the rule, the way of a batch and of a prompt, the legend of shape suffixes.
"""

from esolm_jax.process import startup

__version__ = "0.1.0"

if startup.is_verb():
    startup.begin()
