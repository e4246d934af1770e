"""The choice of the KV cache of a platform."""

import functools

import jax
from jax.sharding import Mesh

from esolm_jax.model.model_config import ModelConfig
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine import kernel_cache, prefix_cache
from esolm_jax.sampling.engine.cache import KVCache
from esolm_jax.sampling.engine.prefix_cache import SLOTS

FEW_SLOTS = 8
# Platform → (the kernels of which platform, whether they are interpreted); none = XLA's products.
KERNELS = {"gpu": ("gpu", False), "tpu": ("tpu", False)}


def round_up(slots: int) -> int:
    """The number of slots of a cache of at least that many."""
    unit = SLOTS if slots > SLOTS else FEW_SLOTS
    return unit * -(-slots // unit)


def no_cache(mesh: Mesh | None) -> KVCache:
    """The cache of families that run the whole text in every pass: a window reads itself only."""
    kernels = KERNELS.get(sharding.platform(mesh))
    return kernel_cache.NoCache(mesh, *kernels) if kernels else prefix_cache.NoCache()


def empty_cache(
    config: ModelConfig, batch: int, slots: int, mesh: Mesh | None = None, aligned: bool = False
) -> KVCache:
    """A cache for B = `batch` rows of at least `slots`, a window's margin included; rows are
    sharded over the mesh as their tokens are.

    Args:
      aligned: all rows write to the same slots, which is faster.
      mesh: None = one device. Of described devices (aot/topology.py): shapes alone.
    """
    kernels = KERNELS.get(sharding.platform(mesh))
    sizes = config, batch, round_up(slots), mesh, aligned, kernels
    if not sharding.is_compile_only(mesh):
        return _zeros(*sizes)
    axes = kernel_cache.AXES if kernels else prefix_cache.AXES
    make = functools.partial(_zeros, *sizes)
    where = jax.tree.map(lambda _: sharding.named_sharding(mesh, *axes), jax.eval_shape(make))
    return sharding.abstract(make, where)


@functools.partial(jax.jit, static_argnums=range(6))
def _zeros(config, batch, slots, mesh, aligned, kernels):
    if kernels:
        return kernel_cache.empty(config, batch, slots, mesh, aligned, kernels)
    return prefix_cache.empty(config, batch, slots, mesh, aligned)
