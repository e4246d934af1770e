"""TPU pods that the compiler supports, and the specifications of their chips."""

import dataclasses
import os
import re

import numpy as np

from esolm_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Chip:
    """The vendor's specifications of a device (a TensorCore or a chip, as XLA counts devices).

    Attributes:
      hbm_bytes: memory. flops: bfloat16 FLOPs per second. hbm_bandwidth: bytes per
        second. ici_bandwidth: bytes per second that it can send to its neighbours, all links.
      env: TPU_ACCELERATOR_TYPE for libtpu.
    """

    hbm_bytes: float
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    env: str


GB = 1e9
GIB = 2.0**30
TFLOPS = 1e12
CHIPS = {
    "v4": Chip(32 * GIB, 275 * TFLOPS, 1228 * GB, 270 * GB, "v4-8"),
    "v5e": Chip(16 * GIB, 197 * TFLOPS, 819 * GB, 180 * GB, "v5litepod-4"),
    "v5p": Chip(95 * GIB, 459 * TFLOPS, 2765 * GB, 540 * GB, "v5p-8"),
    "v6e": Chip(32 * GIB, 918 * TFLOPS, 1640 * GB, 360 * GB, "v6e-4"),
}
_TWO_AXES = ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16")
_THREE_AXES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_THREE_AXES += ("8x8x16", "8x16x16")
KNOWN = {
    "v4": _THREE_AXES,
    "v5e": _TWO_AXES,
    "v5p": _THREE_AXES,
    "v6e": _TWO_AXES,
}


def parse(topology: str) -> tuple[Chip, str]:
    """The chip of a topology such as "v5e:16x16", and its name in libtpu.

    Raises:
      UserError: an unknown topology; the message lists the known ones.
    """
    known = [f"{chip}:{shape}" for chip, shapes in KNOWN.items() for shape in shapes]
    if topology not in known:
        raise UserError(
            f"--topology={topology}: must be one of {listed()}{nearest(topology, known)}"
        )
    return CHIPS[topology.split(":")[0]], topology


def listed() -> str:
    """The known topologies, for messages."""
    return "; ".join(f"{chip}: {', '.join(shapes)}" for chip, shapes in KNOWN.items())


def num_chips(topology: str) -> int:
    return int(np.prod([int(n) for n in re.findall(r"\d+", topology.split(":")[1])]))


def devices(topology: str, num_slices: int = 1) -> list:
    """The devices of that many slices of a pod, to compile for; none of them need exist.

    Raises:
      UserError: an unknown topology, or the TPU compiler is not installed.
    """
    chip, name = parse(topology)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", chip.env)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several compilers at a time
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--topology: needs the TPU compiler (libtpu): pip install 'esolm_jax[tpu]'"
        ) from error
    from jax.experimental import topologies

    options = {"num_slices": num_slices} if num_slices > 1 else {}
    return list(topologies.get_topology_desc(name, "tpu", **options).devices)
