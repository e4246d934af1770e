"""The earlier place of published/reference.py, kept for code that imports it from here."""

from esolm_jax.interop.published.reference import Reference, load

__all__ = ["Reference", "load"]
