"""The device mesh, and where batches and parameters lie on it.

One axis so far, `data`: rows of a batch are split over it, parameters are whole on every device.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from esolm_jax.errors import UserError


def make_mesh(data: int = -1) -> Mesh:
    """A mesh over all devices (data = -1), or over exactly `data` of them."""
    devices = jax.devices()
    size = len(devices) if data == -1 else data
    if size > len(devices):
        raise UserError(f"config.mesh.data={data}: only {len(devices)} devices are there")
    return Mesh(np.array(devices[:size]), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Splits axis `axis` (the rows of a batch) over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def abstract(make: Callable, mesh: Mesh):
    """What make() would return, as ShapeDtypeStructs placed whole on every device."""
    whole = replicated(mesh)
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), jax.eval_shape(make)
    )


def put_batch(batch: dict, mesh: Mesh) -> dict:
    """This process's rows of a global batch (numpy) → global arrays, split by rows."""
    return {
        name: jax.make_array_from_process_local_data(rows(mesh), array)
        for name, array in batch.items()
    }
