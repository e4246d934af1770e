"""The KV cache of generation as explicit state: `attend` and `write`. Float32 softmax, exact.

A window of W tokens reads itself by the attention rule, and all filled slots of the cache. The
number of filled slots grows pass by pass, so a program has branches for prefixes of the cache.

The loops and the network see `attend`, `pending` and `write` only. The layout of keys, the prefixes
and the order of reads and writes are private to this file and `cpu_kernels.py`.
"""

import functools
from typing import Protocol, Self

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from esolm_jax.attention.dense import MASKED
from esolm_jax.attention.recompute import pad_to_multiple
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine import cpu_kernels

SLOTS, FEW_SLOTS = 64, 8  # the number of slots is a multiple, so that all parts have one size
PREFIXES = 8
QUERY_CHUNK = 256  # tokens of a window that attend at a time: bounds the memory of their scores


@flax.struct.dataclass
class Visible:
    """The keys that the tokens of a window read.

    Attributes:
      window_BWW: bool, [b, q, k]: token q of the window reads token k of the window.
      filled_B: int32, all tokens read the slots of the cache below it.
    """

    window_BWW: jax.Array
    filled_B: jax.Array


@flax.struct.dataclass
class Entries:
    """Keys and values of a window, to be written to the cache; empty where there is no cache.

    Attributes:
      keys, values: [block], [B, G, W, K].
      reads_done: int32 [], 0, computed from the output of the pass. `write` adds it to the slot it
        writes to: XLA then orders the write after all reads of the pass, and updates the cache in
        place. Without this dependency it copies the whole cache before each pass.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    reads_done: jax.Array

    def first(self, tokens: int) -> Self:
        """The entries of the first tokens of the window."""
        return self._each(lambda a_BGWK: a_BGWK[:, :, :tokens])

    def padded(self, width: int) -> Self:
        """The entries, padded with zeros to this width of the window."""
        return self._each(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, width - a.shape[2]), (0, 0))))

    def _each(self, change) -> Self:
        keys, values = jax.tree.map(change, (self.keys, self.values))
        return self.replace(keys=keys, values=values)


class KVCache(Protocol):
    """The interface of a cache for a decoding loop and its network."""

    def attend(self, block: int, q_BGRWK, k_BGWK, v_BGWK, visible: Visible) -> jax.Array:
        """Attention of a window to itself and to the filled slots of a block: [B, G, R, W, K].

        Args:
          q_BGRWK: queries, scaled by 1/√K. k_BGWK, v_BGWK: keys and values of the window.
        """

    def pending(self, keys, values, output) -> Entries:
        """The entries of a pass: [block], [B, G, W, K], and an array of its output that depends on
        everything that the pass has read."""

    def write(self, entries: Entries, start_B) -> Self:
        """The cache with these entries in slots [start, start + W), which must exist."""


@flax.struct.dataclass
class NoCache:
    """The cache of families that run the whole text in every pass: a window reads itself only."""

    def attend(self, block: int, q_BGRWK, k_BGWK, v_BGWK, visible: Visible):
        del block
        return _attend_prefix(q_BGRWK, (k_BGWK, v_BGWK), visible, 0, None)

    def pending(self, keys, values, output) -> Entries:
        del keys, values, output
        return Entries((), (), jnp.int32(0))

    def write(self, entries: Entries, start_B) -> Self:
        del entries, start_B
        return self


@flax.struct.dataclass
class Cache:
    """Keys and values of S slots for each block.

    Attributes:
      keys: [block], [B, G, J, K, I]: J groups of I interleaved slots, see cpu_kernels.key_slots.
      values: [block], [B, G, S, K].
      aligned: all rows write to the same slots, which is faster.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    aligned: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def prefixes(self) -> list[int]:
        """Numbers of slots that a pass may read: it reads the smallest that holds all filled
        ones."""
        slots = self.values[0].shape[2]
        unit = SLOTS * -(-slots // (PREFIXES * SLOTS))
        return [*range(unit, slots, unit), slots]

    def attend(self, block: int, q_BGRWK, k_BGWK, v_BGWK, visible: Visible):
        run = functools.partial(_attend_prefix, q_BGRWK, (k_BGWK, v_BGWK), visible)
        past, prefixes = (self.keys[block], self.values[block]), self.prefixes
        index = jnp.sum(visible.filled_B.max() > jnp.array(prefixes[:-1], jnp.int32))
        return jax.lax.switch(index, [functools.partial(run, n) for n in prefixes], past)

    def pending(self, keys, values, output) -> Entries:
        # False for every number, also NaN; XLA does not know that.
        reads_done = jnp.minimum((output > jnp.inf).astype(jnp.int32).min(), 0)
        return Entries(tuple(keys), tuple(values), reads_done)

    def write(self, entries: Entries, start_B) -> Self:
        start_B = start_B + entries.reads_done

        def put_all(one, olds, news):
            start, axis = (start_B[0], None) if self.aligned else (start_B, 0)
            put = jax.vmap(one, in_axes=(0, 0, axis))
            return tuple(put(old, new, start) for old, new in zip(olds, news, strict=True))

        return self.replace(
            keys=put_all(_put_keys, self.keys, entries.keys),
            values=put_all(_put, self.values, entries.values),
        )


def round_up(slots: int) -> int:
    """The number of slots of a cache of at least that many."""
    unit = SLOTS if slots > SLOTS else FEW_SLOTS
    return unit * -(-slots // unit)


@functools.partial(jax.jit, static_argnames=("config", "batch", "slots", "mesh", "aligned"))
def empty_cache(
    config: ModelConfig, batch: int, slots: int, mesh: Mesh | None = None, aligned: bool = False
) -> Cache:
    """A cache for B = `batch` rows of at least `slots`, a window's margin included; rows are
    sharded over the mesh as their tokens are."""
    interleaved, width, slots = cpu_kernels.key_slots(mesh), config.head_width, round_up(slots)

    def zeros(*shape):
        zero = jnp.zeros((batch, config.groups, *shape), config.dtype)
        return tuple(sharding.constrain(mesh, zero, "rows", "heads") for _ in range(config.blocks))

    keys = zeros(slots // interleaved, width, interleaved)
    return Cache(keys=keys, values=zeros(slots, width), aligned=aligned)


def _attend_prefix(q_BGRWK, window, visible: Visible, prefix: int, past):
    """Attention to the window's (keys, values) and to the cache's slots below `prefix`, for
    QUERY_CHUNK tokens at a time."""
    run = functools.partial(
        _attend_chunk, window=window, filled_B=visible.filled_B, prefix=prefix, past=past
    )
    *heads, width, head_width = q_BGRWK.shape
    chunks = -(-width // QUERY_CHUNK)
    if chunks == 1:
        return run(q_BGRWK, visible.window_BWW)
    size = -(-width // chunks)
    q = pad_to_multiple(q_BGRWK, 3, size).reshape(*heads, chunks, size, head_width)
    mask = pad_to_multiple(visible.window_BWW, 1, size).reshape(-1, chunks, size, width)
    each = jnp.moveaxis(q, 3, 0), jnp.moveaxis(mask, 1, 0)
    out = jnp.moveaxis(jax.lax.map(lambda chunk: run(*chunk), each), 0, 3)
    return out.reshape(*heads, chunks * size, head_width)[:, :, :, :width]


def _attend_chunk(q_BGRWK, mask_BWW, *, window, filled_B, prefix: int, past):
    """Softmax in float32."""
    k_BGWK, v_BGWK = window
    batch, groups, per_group, queries, head_width = q_BGRWK.shape
    width = k_BGWK.shape[2]
    q = q_BGRWK.reshape(batch, groups, per_group * queries, head_width)
    here = cpu_kernels.attention_scores(q, k_BGWK[..., None], width)
    here = here.reshape(q_BGRWK.shape[:4] + (width,))
    here = jnp.where(mask_BWW[:, None, None], here, MASKED).reshape(*q.shape[:3], width)
    parts = [(here, lambda p: cpu_kernels.weighted_values(p, v_BGWK, width))]
    if prefix:
        keys, values = past
        scores = _scores_of_cache(q, keys, prefix, filled_B)
        parts.append((scores, lambda p: cpu_kernels.weighted_values(p, values, prefix)))
    top = functools.reduce(jnp.maximum, [scores.max(-1, keepdims=True) for scores, _ in parts])
    total, out = 0.0, 0.0
    for scores, weigh in parts:
        p = jnp.exp(scores - top)
        total, out = total + p.sum(-1, keepdims=True), out + weigh(p.astype(v_BGWK.dtype))
    return (out / total).reshape(q_BGRWK.shape)


def _scores_of_cache(q_BGTK, keys_BGJKI, prefix: int, filled_B):
    """[B, G, T, prefix]. The slots become one axis at the end only: XLA does not vectorise a loop
    over both."""
    interleaved = keys_BGJKI.shape[4]
    parts = prefix // interleaved
    slot = jnp.arange(prefix).reshape(1, parts, interleaved)

    def some():
        seen = slot < filled_B[:, None, None]
        scores = cpu_kernels.attention_scores(q_BGTK, keys_BGJKI, parts)
        return jnp.where(seen[:, None, None], scores, MASKED)

    none = functools.partial(jnp.full, (*q_BGTK.shape[:3], parts, interleaved), MASKED, jnp.float32)
    # The branch also keeps XLA from computing the scores twice, for the maximum and for exp.
    scores = jax.lax.cond(filled_B.max() > 0, some, none)
    return scores.reshape(*q_BGTK.shape[:3], prefix)


def _put(old_GSK, new_GWK, start):
    return jax.lax.dynamic_update_slice_in_dim(old_GSK, new_GWK, start, axis=1)


def _put_keys(old_GJKI, new_GWK, start):
    """Updates all J that W slots may touch, as one slice."""
    groups, parts, width, interleaved = old_GJKI.shape
    touched = min(parts, 1 + -(-(new_GWK.shape[1] - 1) // interleaved))
    first = jnp.minimum(start // interleaved, parts - touched)
    part = jax.lax.dynamic_slice_in_dim(old_GJKI, first, touched, axis=1)
    slots = part.swapaxes(2, 3).reshape(groups, touched * interleaved, width)
    slots = _put(slots, new_GWK, start - first * interleaved)
    part = slots.reshape(groups, touched, interleaved, width).swapaxes(2, 3)
    return jax.lax.dynamic_update_slice_in_dim(old_GJKI, part, first, axis=1)
