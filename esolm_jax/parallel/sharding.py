"""The device mesh and the sharding of every array: the single source of truth for sharding.

Four mesh axes (config.mesh): rows of a batch are split over `data` and `fsdp`, tokens of a row over
`sequence`; parameters, EMA and optimizer state over `fsdp` and `tensor`; heads, the inner width of
the MLP and the vocabulary over `tensor`. The tables below define the shardings; jit and sharding
constraints apply them.
"""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from esolm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence")  # from the slowest network to the fastest
ROWS = ("data", "fsdp")

# Logical axis of an array → mesh axes.
RULES = {
    "rows": ROWS,
    "tokens": "sequence",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

# Path of a parameter → logical axes of its dimensions, after the leading axis of blocks/….
PARAMETERS = {
    "embedding/embedding": ("vocab", "embed"),
    "positions/embedding": ("vocab", "embed"),
    "time/inner/kernel": (None, None),
    "time/inner/bias": (None,),
    "time/outer/kernel": (None, None),
    "time/outer/bias": (None,),
    "blocks/attention_norm/scale": (None, None),
    "blocks/attention_norm/bias": (None, None),
    "blocks/qkv/kernel": (None, "embed", "heads", None, None),
    "blocks/qkv/bias": (None, "heads", None, None),
    "blocks/q_norm/scale": (None, None),
    "blocks/k_norm/scale": (None, None),
    "blocks/attention_out/kernel": (None, "heads", "embed"),
    "blocks/attention_out/bias": (None, None),
    "blocks/mlp_norm/scale": (None, None),
    "blocks/mlp_norm/bias": (None, None),
    "blocks/mlp_in/kernel": (None, "embed", None, "mlp"),
    "blocks/mlp_in/bias": (None, None, "mlp"),
    "blocks/mlp_out/kernel": (None, "mlp", "embed"),
    "blocks/mlp_out/bias": (None, None),
    "blocks/modulation/linear/kernel": (None, None, "embed"),
    "blocks/modulation/linear/bias": (None, None),
    "final_norm/scale": (None,),
    "final_norm/bias": (None,),
    "final_modulation/linear/kernel": (None, "embed"),
    "final_modulation/linear/bias": (None,),
    "logits/kernel": ("embed", "vocab"),
    "logits/bias": ("vocab",),
}


def mesh_shape(mesh_config, num_devices: int) -> dict[str, int]:
    """Axis sizes of config.mesh over `num_devices`; one axis may be -1: the rest of the devices.

    Raises:
      UserError: their product is not the number of devices.
    """
    sizes = {axis: mesh_config[axis] for axis in AXES}
    sizes_text = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"config.mesh ({sizes_text}): must have at most one axis of -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and num_devices % fixed == 0:
        sizes[free[0]] = num_devices // fixed
    elif fixed != num_devices:
        must = "must multiply to a divisor of" if free else "must multiply to"
        raise UserError(
            f"config.mesh ({sizes_text}): {must} the {num_devices} devices, not to {fixed}"
        )
    return sizes


def make_mesh(mesh_config, devices: Sequence | None = None) -> Mesh:
    """The mesh of config.mesh over the first config.mesh.devices (0 = all) of `devices` (default:
    all that JAX has).

    Several TPU slices: `data` goes over the slow network between them. Raises UserError if the
    axes do not multiply to the devices, or a process of the run has none of them.
    """
    are_all, devices = devices is None, jax.devices() if devices is None else devices
    if mesh_config.devices > len(devices):
        raise UserError(
            f"config.mesh.devices={mesh_config.devices}: must be at most {len(devices)}, the "
            "number of devices"
        )
    devices = devices[: mesh_config.devices or None]
    if are_all:
        have = len({device.process_index for device in devices})
        if have < jax.process_count():
            raise UserError(
                f"config.mesh.devices={mesh_config.devices}: must be 0 (all), because these "
                f"devices belong to {have} of the {jax.process_count()} processes"
            )
    shape = mesh_shape(mesh_config, len(devices))
    sizes = tuple(shape.values())
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices > 1:
        if shape["data"] % slices:
            raise UserError(
                f"config.mesh.data={shape['data']}: must be a multiple of the {slices} slices"
            )
        inner = (shape["data"] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1, 1), devices)
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices).reshape(sizes)
    return Mesh(grid, AXES)


def mesh_of(device: jax.Device) -> Mesh:
    """The mesh of one device."""
    return Mesh(np.array(device).reshape([1] * len(AXES)), AXES)


def device(mesh: Mesh | None) -> jax.Device:
    """The first device of a mesh (None: the default device). Its programs run there, even if they
    are compiled elsewhere."""
    return mesh.devices.flat[0] if mesh else jax.devices()[0]


def platform(mesh: Mesh | None) -> str:
    """The platform of the devices of a mesh (None: of the default device): "cpu", "gpu" or
    "tpu"."""
    return device(mesh).platform


def describe(mesh: Mesh) -> str:
    """Such as "8 cpu devices (data=4, tensor=2) in 2 processes"."""
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    processes = len({device.process_index for device in mesh.devices.flat})
    text = f"{mesh.size} {platform(mesh)} device{'s' if mesh.size > 1 else ''}"
    text += f" ({axes})" if axes else ""
    return text + (f" in {processes} processes" if processes > 1 else "")


def num_row_shards(mesh: Mesh) -> int:
    """The number of shards of the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def padded_rows(mesh: Mesh, rows: int) -> int:
    """The number of rows of a batch that holds `rows`: a multiple of its shards."""
    return rows + -rows % num_row_shards(mesh)


def spec(*logical: str | None) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions have these logical axes."""
    return PartitionSpec(*(RULES[name] if name else None for name in logical))


def named_sharding(mesh: Mesh, *logical: str | None) -> NamedSharding:
    return NamedSharding(mesh, spec(*logical))


def constrain(mesh: Mesh | None, array, *logical: str | None):
    """The array with a sharding constraint, inside jit; unchanged without a mesh."""
    if mesh is None:
        return array
    return jax.lax.with_sharding_constraint(array, named_sharding(mesh, *logical))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Splits axis `axis` (the rows of a batch) over the devices."""
    return named_sharding(mesh, *[None] * axis, "rows")


def parameters(mesh: Mesh, params):
    """The sharding of every parameter: a tree like `params` (arrays or shapes).

    Raises:
      UserError: a dimension does not divide by its mesh axis.
    """

    def one(path, leaf):
        name = "/".join(key.key for key in path)
        logical = PARAMETERS[name]
        for size, axis in zip(leaf.shape, logical, strict=True):
            over = RULES[axis] if axis else None
            if over and size % mesh.shape[over]:
                raise UserError(
                    f"config.mesh.{over}={mesh.shape[over]}: must divide {size}, the `{axis}` "
                    f"dimension of {name} {leaf.shape}, because it is split over `{over}`"
                )
        return named_sharding(mesh, *logical)

    return jax.tree.map_with_path(one, params)


def abstract(make: Callable, shardings):
    """The result of make() as ShapeDtypeStructs with these shardings."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        jax.eval_shape(make),
        shardings,
    )


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether devices of the mesh belong to other processes of this run."""
    if mesh is None or is_compile_only(mesh):
        return False
    return not replicated(mesh).is_fully_addressable


def is_compile_only(mesh: Mesh | None) -> bool:
    """Whether the devices of the mesh are described only (aot/topology.py): they hold no arrays."""
    return mesh is not None and "CompileOnly" in type(mesh.devices.flat[0].client).__name__


def put(tree, where: NamedSharding):
    """Arrays of a tree on the devices of a sharding; their shapes if there are no devices.

    Host arrays are whole, and the same in all processes of the mesh."""

    def one(array):
        if is_compile_only(where.mesh):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)
        if where.is_fully_addressable or isinstance(array, jax.Array):
            return jax.device_put(array, where)
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    return jax.tree.map(one, tree)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that this process's devices hold, ascending."""
    index_maps = rows(mesh).addressable_devices_indices_map((batch_size,))
    return sorted({row for (part,) in index_maps.values() for row in range(batch_size)[part]})


def put_batch(batch: dict, mesh: Mesh, batch_size: int) -> dict:
    """This process's rows (local_rows, numpy) of a global batch → global arrays, split by rows."""
    index_of = {row: i for i, row in enumerate(local_rows(mesh, batch_size))}

    def put(local):
        def part(index):
            wanted = range(batch_size)[index[0]]
            return local[[index_of[row] for row in wanted]]

        shape = (batch_size, *local.shape[1:])
        return jax.make_array_from_callback(shape, rows(mesh), part)

    return {name: put(array) for name, array in batch.items()}
