"""The interface of the KV cache.

A window of W tokens reads itself by the attention rule, and all filled slots of the cache. The
loops and the network see `attend`, `pending` and `write` only. Layouts, prefixes, kernels and the
order of reads and writes are private to prefix_cache.py and kernel_cache.py.
"""

from typing import Protocol, Self

import flax.struct
import jax
import jax.numpy as jnp

from esolm_jax.family.rule import visible
from esolm_jax.model import layers, rope
from esolm_jax.model.model_config import ModelConfig

KeyValue = tuple[jax.Array, jax.Array]


@flax.struct.dataclass
class Visible:
    """The keys that the tokens of a window read.

    Attributes:
      rank, in_context: int32 and bool [B, W], by which the window reads itself (family/rule.py).
      filled: int32 [B], all tokens read the slots of the cache below it.
    """

    rank: jax.Array
    in_context: jax.Array
    filled: jax.Array

    @property
    def window_BWW(self) -> jax.Array:
        """bool, [b, q, k]: token q of the window reads token k of the window."""
        rank, is_context = self.rank, self.in_context
        return visible(rank[:, :, None], is_context[:, :, None], rank[:, None], is_context[:, None])


@flax.struct.dataclass
class Heads:
    """Queries, keys and values of one block for a window, before norm and rotation.

    Attributes:
      products: [B, W, G, R + 2, K], the queries of each group, its key and its value.
      bias: float32 [G, R + 2, K] to be added to them, or None.
      scale: float32 [R + 1, K], of normed queries (with 1/√K) and keys, or None = no norm. Without
        a norm, the products of queries are scaled by 1/√K.
      cos, sin: float32 [B, W, K] of the rotation, see rope.rope_angles, or None.
      config: of the trained model.
    """

    products: jax.Array
    bias: jax.Array | None
    scale: jax.Array | None
    cos: jax.Array | None
    sin: jax.Array | None
    config: ModelConfig = flax.struct.field(pytree_node=False)

    def ready(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, W, G, R, K], keys and values [B, W, G, K], ready to attend."""
        sums = self.products
        if self.bias is not None:
            sums = sums + self.bias.astype(sums.dtype)[None, None]
        qk = sums[:, :, :, :-1]
        if self.scale is not None:
            normed = layers.rms_normalize(self.config, qk.astype(jnp.float32))
            qk = (normed * self.scale[None, None, None]).astype(qk.dtype)
        if self.cos is not None:
            qk = rope.rotate(qk, [part[:, :, None, None] for part in (self.cos, self.sin)])
        return qk[:, :, :, :-1], qk[:, :, :, -1], sums[:, :, :, -1]


@flax.struct.dataclass
class Entries:
    """Keys and values of a window, to be written to the cache; empty where there is no cache.

    Attributes:
      keys, values: [block], [B, W, G, K].
      reads_done: int32 [], 0, computed from the output of the pass. `write` adds it to the slot it
        writes to: XLA then orders the write after all reads of the pass, and updates the cache in
        place. Without this dependency it copies the whole cache before each pass.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    reads_done: jax.Array

    @classmethod
    def none(cls) -> Self:
        return cls((), (), jnp.int32(0))

    def first(self, tokens: int) -> Self:
        """The entries of the first tokens of the window."""
        return self._each(lambda a_BWGK: a_BWGK[:, :tokens])

    def padded(self, width: int) -> Self:
        """The entries, padded with zeros to this width of the window."""
        return self._each(lambda a: jnp.pad(a, ((0, 0), (0, width - a.shape[1]), (0, 0), (0, 0))))

    def _each(self, change) -> Self:
        keys, values = jax.tree.map(change, (self.keys, self.values))
        return self.replace(keys=keys, values=values)


class KVCache(Protocol):
    """The interface of a cache for a decoding loop and its network."""

    def attend(self, block: int, heads: Heads, visible: Visible) -> tuple[jax.Array, KeyValue]:
        """(attention of a window to itself and to the filled slots of a block [B, W, G, R, K], the
        window's keys and values [B, W, G, K])."""

    def pending(self, pairs: list[KeyValue], output) -> Entries:
        """The entries of a pass: keys and values of each block, and an array of its output that
        depends on everything that the pass has read."""

    def write(self, entries: Entries, start_B) -> Self:
        """The cache with these entries in slots [start, start + W), which must exist."""


def entries_of(pairs: list[KeyValue], output) -> Entries:
    """See KVCache.pending."""
    # False for every number, also NaN; XLA does not know that.
    reads_done = jnp.minimum((output > jnp.inf).astype(jnp.int32).min(), 0)
    keys, values = zip(*pairs, strict=True)
    return Entries(keys, values, reads_done)
