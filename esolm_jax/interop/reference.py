"""`load` under its earlier import path; see published/names.py."""

from esolm_jax.interop.published.names import load

__all__ = ["load"]
