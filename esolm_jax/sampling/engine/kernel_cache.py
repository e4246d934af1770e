"""The KV cache of GPUs and TPUs: one kernel reads the filled slots, and a pass writes to all blocks
at once. No instruction but the write in place produces an array of the cache's size.
"""

import functools
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from esolm_jax.model.model_config import ModelConfig
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine import prefix_cache, project, quantize
from esolm_jax.sampling.engine.cache import (
    Entries,
    Heads,
    KeepsNothing,
    KeyValue,
    Visible,
    entries_of,
)
from esolm_jax.sampling.engine.project import Projection
from esolm_jax.sampling.engine.quantize import Quantized, Slots

QUANTIZED_SLOTS = 128  # their number is a multiple: a TPU reads tiles of so many scales


def specs(slots: Slots) -> Any:
    """The PartitionSpec of each part of the keys or values of a cache."""
    whole = sharding.spec(None, "rows", None, "heads")
    if not isinstance(slots, Quantized):
        return whole
    return Quantized(whole, sharding.spec(None, "rows", "heads"))


def _attend_with(platform: str, heads: Heads, visible: Visible, past, block: int, interpret: bool):
    """The kernel of a platform. Importing Pallas takes a second."""
    if platform == "gpu":
        from esolm_jax.sampling.engine import decode_gpu

        return decode_gpu.attend(heads, visible, past, block=block, interpret=interpret)
    from esolm_jax.sampling.engine import decode_tpu

    if past is None or not decode_tpu.fits(heads):  # wide windows: matrix products
        slots = jax.tree.map(lambda of: of[block], past)
        out, pair = prefix_cache.attend_all(heads, visible, slots)
        return out, tuple(jnp.moveaxis(a, 1, 2) for a in pair)
    return decode_tpu.attend(heads, visible, past, block=block, interpret=interpret)


@flax.struct.dataclass
class _Kernels:
    """Attention and products by kernels.

    Attributes:
      mesh: None = one device.
      platform: "gpu" or "tpu", of the kernel.
      interpret: run the kernels in Python, on any device.
    """

    mesh: Mesh | None = flax.struct.field(pytree_node=False, default=None)
    platform: str = flax.struct.field(pytree_node=False, default="gpu")
    interpret: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def projection(self) -> Projection:
        return Projection(self.mesh, self.platform, self.interpret, project.MOST_TOKENS)

    def run(self, block: int, heads: Heads, visible: Visible, past=None):
        """The kernel, on each device's rows and groups."""
        run = functools.partial(_attend_with, self.platform, block=block, interpret=self.interpret)
        if self.mesh is None:
            return run(heads, visible, past)
        split = sharding.spec("rows", None, "heads")
        rows = sharding.spec("rows")
        of_heads = heads.replace(
            products=split, bias=sharding.spec("heads"), scale=PartitionSpec(), cos=rows, sin=rows
        )
        return jax.shard_map(
            run,
            mesh=self.mesh,
            in_specs=(of_heads, rows, past and tuple(map(specs, past))),
            out_specs=(split, (split, split)),
            check_vma=False,  # kernels do not declare over which axes their results vary
        )(heads, visible, past)


@flax.struct.dataclass
class NoCache(_Kernels, KeepsNothing):
    """See cache.no_cache."""

    def attend(self, block: int, heads: Heads, visible: Visible):
        return self.run(block, heads, visible)


@flax.struct.dataclass
class KernelCache(_Kernels):
    """Keys and values of S slots for each of N blocks.

    Attributes:
      keys, values: [N, B, S, G·K]: the heads of a slot are adjacent, so that narrow heads waste
        nothing of a TPU's tiles. The scales of quantized ones are [N, B, G, S].
      aligned: all rows write to the same slots.
    """

    keys: Slots | None = None
    values: Slots | None = None
    aligned: bool = flax.struct.field(pytree_node=False, default=False)

    def attend(self, block: int, heads: Heads, visible: Visible):
        return self.run(block, heads, visible, (self.keys, self.values))

    def pending(self, pairs: list[KeyValue], output) -> Entries:
        return entries_of(pairs, output, token_axis=1)

    def write(self, entries: Entries, start_B) -> Self:
        start_B = start_B + entries.reads_done

        def put(old, new, axis: int):
            if self.aligned:
                return jax.lax.dynamic_update_slice_in_dim(old, new, start_B[0], axis)
            one = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1)
            return jax.vmap(one, in_axes=(1, 1, 0), out_axes=1)(old, new, start_B)

        def put_slots(old_NBSD, new_NBWGK):
            return put(old_NBSD, new_NBWGK.reshape(*new_NBWGK.shape[:3], -1), 2)

        def put_scale(old_NBGS, new_NBWG):
            return put(old_NBGS, jnp.swapaxes(new_NBWG, 2, 3), 3)

        def update(old, news):
            return quantize.update(old, jnp.stack(news), put_slots, put_scale)

        return self.replace(
            keys=update(self.keys, entries.keys), values=update(self.values, entries.values)
        )


def empty(
    config: ModelConfig,
    batch: int,
    slots: int,
    mesh: Mesh | None,
    aligned: bool,
    kernels: tuple[str, bool],
    dtype: str,
) -> KernelCache:
    """Empty slots; `kernels`: platform and interpret."""
    if dtype in quantize.LARGEST:
        slots = QUANTIZED_SLOTS * -(-slots // QUANTIZED_SLOTS)
    rows, groups = (config.blocks, batch), config.groups
    zero = quantize.zeros((*rows, slots, groups * config.head_width), (*rows, groups, slots), dtype)
    if mesh is not None:
        where = jax.tree.map(functools.partial(NamedSharding, mesh), specs(zero))
        zero = jax.lax.with_sharding_constraint(zero, where)
    return KernelCache(mesh, *kernels, keys=zero, values=zero, aligned=aligned)
