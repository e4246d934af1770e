"""Labelled tokens: the only information that the model has about an objective."""

import dataclasses
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Layout:
    """Labels that follow from a token's index alone: M query copies, then L tokens in context.

    Context token i has rank i // block; the query copies are those of the last M context tokens
    and have their ranks. Kernels with static masks rely on it.

    Attributes:
      length: L. queries: M, 0 <= M <= L. block: context tokens of one rank.
    """

    length: int
    queries: int = 0
    block: int = 1

    def labels(self, index):
        """(rank, in_context) of the tokens at these indices in [0, M + L); arrays or integers of
        NumPy, JAX or a Pallas kernel."""
        in_context = index >= self.queries
        of_query = index + (self.length - self.queries)
        context = index - self.queries
        return jnp.where(in_context, context, of_query) // self.block, in_context


@flax.struct.dataclass
class Tokens:
    """The tokens of one forward pass, each with its four labels. All arrays are [B, T].

    Attributes:
      token: int32, vocabulary id; the mask id where the token is to be predicted.
      position: int32, index in the text (for RoPE).
      rank: int32, index in the generation order: small = known early.
      in_context: bool. True: readable by every token of this rank or later. False: a query copy,
        readable only by query copies of the same rank.
      layout: ranks and contexts as functions of the index, the same in every row, or None. A token
        with another rank than the layout's is padding: its rank is later, so no token reads it.
    """

    token: jax.Array
    position: jax.Array
    rank: jax.Array
    in_context: jax.Array
    layout: Layout | None = flax.struct.field(pytree_node=False, default=None)

    def concat(self, other: Self, layout: Layout | None = None) -> Self:
        """Concatenates two streams along the token axis."""
        pairs = zip(jax.tree.leaves(self), jax.tree.leaves(other), strict=True)
        return Tokens(*(jnp.concatenate(pair, axis=1) for pair in pairs), layout=layout)


@flax.struct.dataclass
class LabelledBatch:
    """Tokens with targets: the output of every objective and the input of every loss.

    The loss is Σ weight · (−log p(target)) / Σ num_tokens, over the first P tokens of the pass.

    Attributes:
      tokens: Tokens [B, T].
      target: int32 [B, P], P <= T: the tokens that the first P tokens predict.
      weight: float32 [B, P]; 0 where nothing is predicted.
      num_tokens: int32 [B], number of real (not padding) text tokens in each row.
    """

    tokens: Tokens
    target: jax.Array
    weight: jax.Array
    num_tokens: jax.Array
