"""The interface of the KV cache.

A window of W tokens reads itself by the attention rule, and all filled slots of the cache. The
loops and the network see `attend`, `pending` and `write` only. Layouts, prefixes, kernels and the
order of reads and writes are private to prefix_cache.py and kernel_cache.py.
"""

import functools
from typing import Protocol, Self

import flax.struct
import jax
import jax.numpy as jnp

from esolm_jax.family.rule import visible
from esolm_jax.model import layers, rope
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.sampling.engine.project import Projection

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
        """Queries [B, G, R, W, K], keys and values [B, G, W, K], ready to attend. Head-major before
        anything else: on a CPU, passes of many tokens would take up to three times as long."""
        sums = self.products
        if self.bias is not None:
            sums = sums + self.bias.astype(sums.dtype)[None, None]
        sums_BGRWK = jnp.moveaxis(sums, 1, 3)
        qk, v = sums_BGRWK[:, :, :-1], sums_BGRWK[:, :, -1]
        if self.scale is not None:
            normed = layers.rms_normalize(self.config, qk.astype(jnp.float32))
            qk = (normed * self.scale[None, None, :, None]).astype(qk.dtype)
        if self.cos is not None:
            qk = rope.rotate(qk, [part[:, None, None] for part in (self.cos, self.sin)])
        return qk[:, :, :-1], qk[:, :, -1], v


@flax.struct.dataclass
class Entries:
    """Keys and values of a window, to be written to the cache; empty where there is no cache.

    Attributes:
      keys, values: [block], [B, G, W, K] if tokens are axis 2, [B, W, G, K] if they are axis 1.
      reads_done: int32 [], 0, computed from the output of the pass. `write` adds it to the slot it
        writes to: XLA then orders the write after all reads of the pass, and updates the cache in
        place. Without this dependency it copies the whole cache before each pass.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    reads_done: jax.Array
    token_axis: int = flax.struct.field(pytree_node=False, default=2)

    def first(self, tokens: int) -> Self:
        """The entries of the first tokens of the window."""
        keep = functools.partial(jax.lax.slice_in_dim, start_index=0, limit_index=tokens)
        return self._each(functools.partial(keep, axis=self.token_axis))

    def padded(self, width: int) -> Self:
        """The entries, padded with zeros to this width of the window."""
        return self._each(lambda a: pad_to(a, self.token_axis, width))

    def _each(self, change) -> Self:
        keys, values = jax.tree.map(change, (self.keys, self.values))
        return self.replace(keys=keys, values=values)


class KVCache(Protocol):
    """The interface of a cache for a decoding loop and its network."""

    @property
    def projection(self) -> Projection:
        """How matrix products are computed where this cache is used."""

    def attend(self, block: int, heads: Heads, visible: Visible) -> tuple[jax.Array, KeyValue]:
        """(attention of a window to itself and to the filled slots of a block [B, W, G, R, K], the
        window's keys and values, as Entries have them)."""

    def pending(self, pairs: list[KeyValue], output) -> Entries:
        """The entries of a pass: keys and values of each block, and an array of its output that
        depends on everything that the pass has read."""

    def write(self, entries: Entries, start_B) -> Self:
        """The cache with these entries in slots [start, start + W), which must exist."""


class KeepsNothing:
    """`pending` and `write` of a cache without slots."""

    def pending(self, pairs: list[KeyValue], output) -> Entries:
        del pairs, output
        return Entries((), (), jnp.int32(0))

    def write(self, entries: Entries, start_B) -> Self:
        del entries, start_B
        return self


def pad_to(array, axis: int, size: int):
    """The array, padded with zeros at the end of an axis."""
    pads = [(0, size - array.shape[axis] if i == axis else 0) for i in range(array.ndim)]
    return jnp.pad(array, pads)


def entries_of(pairs: list[KeyValue], output, token_axis: int) -> Entries:
    """See KVCache.pending."""
    # False for every number, also NaN; XLA does not know that.
    reads_done = jnp.minimum((output > jnp.inf).astype(jnp.int32).min(), 0)
    keys, values = zip(*pairs, strict=True)
    return Entries(keys, values, reads_done, token_axis)
