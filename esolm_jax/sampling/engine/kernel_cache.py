"""The KV cache of GPUs: one kernel reads the filled slots, and a pass writes to all blocks at once.

No instruction but the write in place produces an array of the cache's size.
"""

import functools
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from esolm_jax.model.model_config import ModelConfig
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine.cache import Entries, Heads, KeyValue, Visible, entries_of

AXES = (None, "rows", None, "heads")  # logical axes of all arrays of a cache
INTERPRET = False  # tests run the kernels in Python


def _attend(mesh: Mesh | None, heads: Heads, visible: Visible, past, block: int):
    """The kernel, on each device's rows and groups."""
    from esolm_jax.sampling.engine import decode_kernel  # importing Pallas takes a second

    run = functools.partial(decode_kernel.attend, block=block, interpret=INTERPRET)
    if mesh is None:
        return run(heads, visible, past)
    of_heads = Heads(
        products=sharding.spec("rows", None, "heads"),
        bias=sharding.spec("heads"),
        scale=PartitionSpec(),
        cos=sharding.spec("rows"),
        sin=sharding.spec("rows"),
        config=heads.config,
    )
    split = sharding.spec("rows", None, "heads")
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(of_heads, sharding.spec("rows"), sharding.spec(*AXES)),
        out_specs=(split, (split, split)),
        check_vma=False,  # Pallas kernels do not declare over which axes their results vary
    )(heads, visible, past)


@flax.struct.dataclass
class NoCache:
    """See cache.no_cache."""

    mesh: Mesh | None = flax.struct.field(pytree_node=False, default=None)

    def attend(self, block: int, heads: Heads, visible: Visible):
        return _attend(self.mesh, heads, visible, None, block)

    def pending(self, pairs: list[KeyValue], output) -> Entries:
        del pairs, output
        return Entries.none()

    def write(self, entries: Entries, start_B) -> Self:
        del entries, start_B
        return self


def no_cache(mesh: Mesh | None) -> NoCache:
    return NoCache(mesh)


@flax.struct.dataclass
class KernelCache:
    """Keys and values of S slots for each of N blocks.

    Attributes:
      keys, values: [N, B, S, G, K].
      mesh: None = one device.
      aligned: all rows write to the same slots.
    """

    keys: jax.Array
    values: jax.Array
    mesh: Mesh | None = flax.struct.field(pytree_node=False, default=None)
    aligned: bool = flax.struct.field(pytree_node=False, default=False)

    def attend(self, block: int, heads: Heads, visible: Visible):
        return _attend(self.mesh, heads, visible, (self.keys, self.values), block)

    def pending(self, pairs: list[KeyValue], output) -> Entries:
        return entries_of(pairs, output)

    def write(self, entries: Entries, start_B) -> Self:
        start_B = start_B + entries.reads_done

        def put(old_NBSGK, news):
            new_NBWGK = jnp.stack(news)
            if self.aligned:
                return jax.lax.dynamic_update_slice_in_dim(old_NBSGK, new_NBWGK, start_B[0], 2)
            one = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
            return jax.vmap(one, in_axes=(1, 1, 0), out_axes=1)(old_NBSGK, new_NBWGK, start_B)

        return self.replace(
            keys=put(self.keys, entries.keys), values=put(self.values, entries.values)
        )


def empty(
    config: ModelConfig, batch: int, slots: int, mesh: Mesh | None, aligned: bool
) -> KernelCache:
    shape = config.blocks, batch, slots, config.groups, config.head_width
    zero = jnp.zeros(shape, config.dtype)
    return KernelCache(keys=zero, values=zero, mesh=mesh, aligned=aligned)
