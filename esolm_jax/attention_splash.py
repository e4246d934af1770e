"""Attention by the rule as a block-sparse TPU kernel, for labels that follow from a layout."""

from esolm_jax.attention_lean import lean


def splash(*args, layout, interpret=False):
    """See attention.attend."""
    return lean(*args, layout=layout)
