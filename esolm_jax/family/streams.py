"""Building blocks of labellings: copies of the text in generation order.

Shapes: text, rank and weight [B, L] in text order; order int32 [B, L], the position at each rank.
"""

import jax.numpy as jnp

from esolm_jax.family.labels import LabelledBatch, Layout, Tokens


def take(a_BL, order_BL):
    """The array in generation order."""
    return jnp.take_along_axis(a_BL, order_BL, axis=1)


def index(order_BL):
    """0, 1, 2, … in every row: the ranks if each token has its own."""
    return jnp.broadcast_to(jnp.arange(order_BL.shape[1], dtype=jnp.int32), order_BL.shape)


def stream(text_BL, order_BL, rank_BL, in_context: bool, block: int | None = None) -> Tokens:
    """One copy of the text in generation order. `block`: how many of its tokens share a rank, or
    None if that depends on the row."""
    return Tokens(
        token=take(text_BL, order_BL),
        position=order_BL,
        rank=rank_BL.astype(jnp.int32),
        in_context=jnp.full(order_BL.shape, in_context),
        layout=Layout(order_BL.shape[1], block=block) if block else None,
    )


def two_streams(z: Tokens, x: Tokens, block: int | None = None) -> Tokens:
    """Query copies ‖ context, of the same length."""
    length = x.token.shape[1]
    return z.concat(x, Layout(length, length, block) if block else None)


def labelled(tokens: Tokens, x, valid, order_BL, weight) -> LabelledBatch:
    """The tokens with their targets and weights, in generation order."""
    return LabelledBatch(
        tokens=tokens,
        target=take(x, order_BL),
        weight=take(weight, order_BL).astype(jnp.float32),
        num_tokens=jnp.sum(valid, axis=1, dtype=jnp.int32),
    )
