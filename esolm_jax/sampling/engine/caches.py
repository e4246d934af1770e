"""The choice of the KV cache of a platform."""

import functools

import jax
from jax.sharding import Mesh, NamedSharding

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
    config: ModelConfig,
    batch: int,
    slots: int,
    mesh: Mesh | None = None,
    *,
    aligned: bool = False,
    dtype: str = "auto",
) -> KVCache:
    """A cache for B = `batch` rows of at least `slots`, a window's margin included; rows are
    sharded over the mesh as their tokens are.

    Args:
      aligned: all rows write to the same slots, which is faster.
      dtype: of config.sample.cache_dtype.
      mesh: None = one device. Of described devices (aot/topology.py): shapes alone.
    """
    kernels = KERNELS.get(sharding.platform(mesh))
    dtype = config.dtype if dtype == "auto" else dtype
    sizes = config, batch, round_up(slots), mesh, aligned, kernels, dtype
    if not sharding.is_compile_only(mesh):
        return _zeros(*sizes)
    make = functools.partial(_zeros, *sizes)
    where = jax.eval_shape(make)
    if kernels:
        parts = {name: kernel_cache.specs(getattr(where, name)) for name in ("keys", "values")}
        where = where.replace(**parts)
    else:
        where = jax.tree.map(lambda _: sharding.spec(*prefix_cache.AXES), where)
    return sharding.abstract(make, jax.tree.map(functools.partial(NamedSharding, mesh), where))


@functools.partial(jax.jit, static_argnums=range(7))
def _zeros(config, batch, slots, mesh, aligned, kernels, dtype):
    if kernels:
        return kernel_cache.empty(config, batch, slots, mesh, aligned, kernels, dtype)
    return prefix_cache.empty(config, batch, slots, mesh, aligned, dtype)
