"""Esoteric Language Models in JAX: masked diffusion and autoregression with one attention rule.

The way of the data, file by file:

    config → data/ → noise, order → objectives (labelled tokens) → model (attention) → loss
    → optimizer, train → checkpoint → likelihood, evaluate → sampling/, sample → interop/

Legend of shape suffixes, used everywhere:

    B batch   L text length   T tokens of a forward pass (L or 2L)   P predicted tokens
    V vocabulary (mask token included)   D width   H heads   K width of a head   C condition width
    S slots of the KV cache   N blocks (layers)   W window of one decoding pass   O orders
"""

from esolm_jax.process import startup

__version__ = "0.1.0"

if startup.is_verb():
    startup.begin()
