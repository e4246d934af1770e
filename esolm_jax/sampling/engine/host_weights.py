"""Weights that are rounded to 8 bits on the host, so that a device only ever holds the codes."""

import jax
from jax.sharding import Mesh

from esolm_jax.errors import UserError
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine import network as network_lib
from esolm_jax.sampling.engine.network import Network


def parameter_mesh(dtype: str, mesh: Mesh) -> Mesh:
    """The mesh to load the float32 parameters on: `mesh`, or one CPU device if they are rounded.

    Args:
      dtype: of config.sample.weight_dtype.

    Raises UserError: JAX has no CPU to round on, or the mesh has devices of other processes.
    """
    if dtype == "auto":
        return mesh
    if sharding.spans_processes(mesh):
        raise UserError(
            f"config.sample.weight_dtype={dtype!r}: must be auto in several processes, because "
            "weights are rounded on one host"
        )
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError(
            f"config.sample.weight_dtype={dtype!r}: needs the CPU to round weights; add it to "
            f"JAX_PLATFORMS: {sharding.platform(mesh)},cpu"
        ) from error
    return sharding.mesh_of(device)


def abstract(network, mesh: Mesh) -> Network:
    """ShapeDtypeStructs of a network of arrays or ShapeDtypeStructs, on `mesh`."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        network,
        network_lib.shardings(network, mesh),
    )


def to_devices(network: Network, mesh: Mesh) -> Network:
    """The network on `mesh`, array by array."""
    return jax.tree.map(jax.device_put, network, network_lib.shardings(network, mesh))
