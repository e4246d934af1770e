"""The vendors' specifications of devices: for `compile`, and for the MFU that `train` logs."""

import dataclasses

GB = 1e9
GIB = 2.0**30
TFLOPS = 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device: a TPU's TensorCore or chip, as XLA counts devices, or a GPU.

    Attributes:
      platform: "tpu" or "gpu". hbm_bytes: memory. flops: bfloat16 FLOPs per second.
      hbm_bandwidth: bytes per second. link_bandwidth: bytes per second that it can send to its
        neighbours, all links; of a GPU, inside its node.
      node_bandwidth: of a GPU, bytes per second to other nodes; 0 on a TPU.
      accelerator_type: TPU_ACCELERATOR_TYPE for libtpu, or "".
    """

    platform: str
    hbm_bytes: float
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    node_bandwidth: float = 0.0
    accelerator_type: str = ""


def _tpu(gib: float, tflops: float, hbm: float, links: float, accelerator_type: str) -> Chip:
    return Chip(
        "tpu",
        gib * GIB,
        tflops * TFLOPS,
        hbm * GB,
        links * GB,
        accelerator_type=accelerator_type,
    )


# A GPU's NVLink bandwidth is that of one direction; nodes have a 400 Gbit/s adapter for each GPU
# (200 Gbit/s with A100).
CHIPS = {
    "v4": _tpu(32, 275, 1228, 270, "v4-8"),
    "v5e": _tpu(16, 197, 819, 180, "v5litepod-4"),
    "v5p": _tpu(95, 459, 2765, 540, "v5p-8"),
    "v6e": _tpu(32, 918, 1640, 360, "v6e-4"),
    "a100": Chip("gpu", 84_987_740_160, 312 * TFLOPS, 2039 * GB, 300 * GB, 25 * GB),
    "h100": Chip("gpu", 84_978_434_048, 989 * TFLOPS, 3352 * GB, 450 * GB, 50 * GB),
    "h200": Chip("gpu", 150_754_820_096, 989 * TFLOPS, 4800 * GB, 450 * GB, 50 * GB),
}

# jax.Device.device_kind → name of the chip. Other variants, such as PCIe cards and MIG slices, have
# other peaks.
_DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def of_device(device_kind: str) -> Chip | None:
    """The chip of a jax.Device.device_kind; None if it is unknown, such as a CPU."""
    name = _DEVICE_KINDS.get(device_kind)
    return CHIPS[name] if name else None


@dataclasses.dataclass(frozen=True)
class _Target:
    """What XLA's GPU compiler asks of a device besides its Chip."""

    description: str
    capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    clock_ghz: float
    l2_bytes: int
    shared_per_core: int


_TARGETS = {
    "a100": _Target("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 41_943_040, 167_936),
    "h100": _Target("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 52_428_800, 233_472),
    "h200": _Target("NVIDIA H200", (9, 0), 132, 128, 1.98, 62_914_560, 233_472),
}


def gpu_target(name: str) -> str:
    """The description of a GPU for XLA (a text protocol buffer, GpuTargetConfigProto)."""
    chip, t = CHIPS[name], _TARGETS[name]
    major, minor = t.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {t.shared_per_core}
  shared_memory_per_block_optin: {t.shared_per_core - 1024}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {t.cores} fpus_per_core: {t.fpus_per_core} clock_rate_ghz: {t.clock_ghz}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.hbm_bandwidth)} l2_cache_size: {t.l2_bytes}
  device_memory_size: {int(chip.hbm_bytes)}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{t.description}"
"""
