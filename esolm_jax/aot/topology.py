"""The pods and GPU clusters that `compile` compiles for, without having them.

"v5e:16x16" is a TPU pod of 16 x 16 chips, "h100:8" one node of eight GPUs, "h100:8x8" eight nodes
of eight.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from esolm_jax.aot.chips import CHIPS, Chip, gpu_target
from esolm_jax.errors import UserError, nearest

_TWO_AXES = ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16")
_THREE_AXES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_THREE_AXES += ("8x8x16", "8x16x16")
_NODES = ("1", "2", "4", "8", *(f"{2**n}x8" for n in range(1, 8)))
KNOWN = {
    "v4": _THREE_AXES,
    "v5e": _TWO_AXES,
    "v5p": _THREE_AXES,
    "v6e": _TWO_AXES,
    "a100": _NODES,
    "h100": _NODES,
    "h200": _NODES,
}


def parse(topology: str) -> Chip:
    """The chip of a topology such as "v5e:16x16" or "h100:8". On several nodes of GPUs, its
    link_bandwidth is that of the network between them, as if all that is sent went over it.

    Raises:
      UserError: an unknown topology; the message lists the known ones.
    """
    known = [f"{chip}:{shape}" for chip, shapes in KNOWN.items() for shape in shapes]
    if topology not in known:
        raise UserError(
            f"--topology={topology}: must be one of {listed()}{nearest(topology, known)}"
        )
    name, shape = topology.split(":")
    chip = CHIPS[name]
    across_nodes = chip.platform == "gpu" and "x" in shape
    return dataclasses.replace(chip, link_bandwidth=chip.node_bandwidth) if across_nodes else chip


def listed() -> str:
    """The known topologies, for messages."""
    return "; ".join(f"{chip}: {', '.join(shapes)}" for chip, shapes in KNOWN.items())


def num_chips(topology: str) -> int:
    return math.prod(int(n) for n in re.findall(r"\d+", topology.split(":")[1]))


def devices(topology: str, num_slices: int = 1) -> list:
    """The devices of that many slices of a topology, to compile for; none of them need exist.

    Raises:
      UserError: an unknown topology, several slices of GPUs, or the compiler is not installed.
    """
    chip = parse(topology)
    if chip.platform == "tpu":
        return _tpus(topology, chip, num_slices)
    if num_slices > 1:
        raise UserError(
            f"--num_slices={num_slices}: must be 1 with --topology={topology}, because GPUs have "
            "no slices"
        )
    return _gpus(topology)


def _tpus(topology: str, chip: Chip, num_slices: int) -> list:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", chip.accelerator_type)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several compilers at a time
    _need("libtpu", "tpu", "TPU compiler (libtpu)")
    from jax.experimental import topologies

    options = {"num_slices": num_slices} if num_slices > 1 else {}
    return list(topologies.get_topology_desc(topology, "tpu", **options).devices)


def _gpus(topology: str) -> list:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no lines about the missing driver
    _need("jax_cuda12_plugin", "gpu-compiler", "GPU compiler (jax-cuda12-plugin)")
    from jax.experimental import topologies

    name, shape = topology.split(":")
    nodes, gpus = ([1] + [int(n) for n in shape.split("x")])[-2:]
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name=topology,
        topology=f"1x{nodes}x{gpus}",
        target_config=gpu_target(name),
    )
    return list(described.devices)


@contextlib.contextmanager
def compiling_for(mesh: Mesh) -> Iterator[None]:
    """Programs are lowered and compiled for devices that do not exist.

    JAX's cache of compiled programs is off, because they cannot be loaded from it; and Pallas finds
    the GPU in the context, where jax 0.11 looks for it.
    """
    device = mesh.devices.flat[0]
    found = jax.sharding.AbstractDevice(device.device_kind, None, device.platform)
    abstract = jax.sharding.AbstractMesh((), (), abstract_device=found)
    is_gpu = device.platform == "gpu"
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with jax.sharding.use_abstract_mesh(abstract) if is_gpu else contextlib.nullcontext():
            yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _need(package: str, extra: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--topology: needs the {what}: pip install 'esolm_jax[{extra}]'")
