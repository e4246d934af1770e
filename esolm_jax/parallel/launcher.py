"""The process index and count that the launcher of this process sets, and its accelerators.

JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID set them, or a cluster that JAX knows:
SLURM, Open MPI, TPU workers named in the environment, or any other with ESOLM_CLUSTER=1.
"""

import os
import re
from collections.abc import Mapping

from esolm_jax.errors import UserError

ENV_VARS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
CLUSTER = "ESOLM_CLUSTER"  # "1": JAX detects the cluster
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES")
_GPU_COUNTS = ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE", "SLURM_GPUS")
_DEVICE_IDS = {"SLURM_STEP_GPUS": "GPUs", "SLURM_JOB_GPUS": "GPUs", "TPU_WORKER_ID": "TPUs"}


def launcher_env(environment: Mapping[str, str]) -> dict | None:
    """The launcher's settings for this process: arguments of jax.distributed.initialize."""
    missing = [name for name in ENV_VARS if not environment.get(name)]
    if len(missing) == len(ENV_VARS):
        return None
    if missing:
        raise UserError(
            f"{', '.join(missing)}: missing from the environment; give all of "
            f"{', '.join(ENV_VARS)}, or none for one process"
        )
    address, count, index = (environment[name] for name in ENV_VARS)
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: must be host:port")
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"JAX_NUM_PROCESSES={count}: must be at least 1")
    if not index.isdecimal() or int(index) >= int(count):
        raise UserError(f"JAX_PROCESS_ID={index}: must be in 0..{int(count) - 1}")
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",
    }


def launched() -> str | None:
    """The setting with which a launcher announces several processes; None for one process.

    The names of a TPU's hosts do not count: every process on such a host has them.
    """
    told = launcher_env(os.environ)
    if told is not None:
        return f"JAX_NUM_PROCESSES={told['num_processes']}" if told["num_processes"] > 1 else None
    without_hosts = {k: v for k, v in os.environ.items() if k not in _TPU_HOSTS}
    return "the environment of this process" if in_cluster(without_hosts) else None


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether jax.distributed.initialize() will find several processes without arguments."""

    def number(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdecimal() else 1

    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    workers = environment.get(_TPU_HOSTS[0]) or environment.get(_TPU_HOSTS[1])
    return (
        environment.get(CLUSTER) == "1"
        or (all(name in environment for name in slurm) and number("SLURM_NTASKS") > 1)
        or ("OMPI_MCA_orte_hnp_uri" in environment and number("OMPI_COMM_WORLD_SIZE") > 1)
        or "," in (workers or "")
        or number(_TPU_HOSTS[2]) > 1
    )


def allocated_accelerators(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """The setting with which a cluster gives this process accelerators, and their kind; None
    without one. For example ("SLURM_GPUS_ON_NODE=8", "GPUs")."""
    for name in _GPU_COUNTS:
        if environment.get(name, "0") not in ("", "0"):
            return f"{name}={environment[name]}", "GPUs"
    for name, kind in _DEVICE_IDS.items():
        if environment.get(name):  # "0" is the first of them
            return f"{name}={environment[name]}", kind
    return None
