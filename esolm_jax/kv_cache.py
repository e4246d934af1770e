"""The KV cache: explicit state that a forward pass takes and returns."""

from typing import Self

import flax.struct
import jax
import jax.numpy as jnp

UNREAD_RANK = jnp.iinfo(jnp.int32).max  # the rank of a slot that nobody may read


@flax.struct.dataclass
class KVCache:
    """Keys and values of the slots written so far, with the rank that says who may read them.

    Attributes:
      key, value: [N, B, G, S, K], G = heads of keys and values, in the compute dtype.
      rank: int32 [B, S]; UNREAD_RANK where the slot is empty. All slots are in context.
    """

    key: jax.Array
    value: jax.Array
    rank: jax.Array

    @classmethod
    def empty(cls, config, batch: int, slots: int) -> Self:
        """A cache for a model of these sizes (ModelConfig) with nothing in it."""
        shape = (config.blocks, batch, config.groups, slots, config.head_width)
        return cls(
            key=jnp.zeros(shape, config.dtype),
            value=jnp.zeros(shape, config.dtype),
            rank=jnp.full((batch, slots), UNREAD_RANK, jnp.int32),
        )

    @property
    def in_context(self) -> jax.Array:
        """bool [B, S]: a query copy is never cached to be read by others."""
        return jnp.ones_like(self.rank, bool)

    def write_ranks(self, start, rank_BT) -> Self:
        """Relabels slots [start, start + T); start may be traced."""
        return self.replace(rank=jax.lax.dynamic_update_slice(self.rank, rank_BT, (0, start)))

    def write(self, block, start, k_BHTK, v_BHTK) -> Self:
        """Puts keys and values of one block in slots [start, start + T)."""
        at = (block, 0, 0, start, 0)
        return self.replace(
            key=jax.lax.dynamic_update_slice(self.key, k_BHTK[None], at),
            value=jax.lax.dynamic_update_slice(self.value, v_BHTK[None], at),
        )
