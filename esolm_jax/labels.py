"""Labelled tokens: all that the model ever knows about an objective (DESIGN: the four labels)."""

from typing import Self

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Tokens:
    """The tokens of one forward pass, each with its four labels. All fields are [B, T].

    Attributes:
      token: int32, vocabulary id; the mask id where the token is still to be predicted.
      position: int32, place in the text (what RoPE sees).
      rank: int32, place in the generation order: small = known early.
      in_context: bool. True: readable by every token of this rank or later. False: a query copy,
        readable only by query copies of the same rank.
    """

    token: jax.Array
    position: jax.Array
    rank: jax.Array
    in_context: jax.Array

    def beside(self, other: Self) -> Self:
        """Concatenates two streams along the token axis."""
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), self, other)


@flax.struct.dataclass
class Labelled:
    """Tokens with targets: what every objective returns and every loss reads.

    The loss is Σ weight · (−log p(target)) / Σ num_tokens, over the first P tokens of the pass.

    Attributes:
      tokens: Tokens [B, T].
      target: int32 [B, P], P <= T: what the first P tokens predict.
      weight: float32 [B, P]; 0 where nothing is predicted.
      num_tokens: int32 [B], number of real (not padding) text tokens in each row.
    """

    tokens: Tokens
    target: jax.Array
    weight: jax.Array
    num_tokens: jax.Array
