"""Starts and ends the processes of a run, and numbers them.

A run of one process goes through the same calls, which then do nothing. The order of a run:

    with guard():                     # guard.py: around all that follows
        start(...)                    # before anything asks JAX for a device
        check_accelerators()          # no run on CPUs by mistake
        multihost.check_same({"config": config_hash(config), "code version": code_hash()}, ...)
        ...                           # is_main() writes and prints; StopSignal ends training
"""

import dataclasses
import os
from typing import Any

import jax
from absl import flags

# JAX has no public client of the coordination service, and no public process id without a backend.
from jax._src.distributed import global_state as _jax_state

from esolm_jax.errors import UserError
from esolm_jax.parallel import coordinator, launcher, peers

_JAX_IS_SLOWER = 30  # seconds between peers.py's detection of a dead process and JAX's abort
_ORBAX_BARRIER = "experimental_orbax_use_distributed_barrier"


@dataclasses.dataclass(frozen=True)
class _Connection:
    """The connection to the other processes; `barrier_timeout`: seconds, an argument of start()."""

    barrier_timeout: float
    watch: peers.Watch


_connection: _Connection | None = None


def start(
    *, init_timeout: int, heartbeat_timeout: int, barrier_timeout: int, stoppable: bool = False
) -> None:
    """Joins the other processes of the run, if the environment names any.

    See launcher.py for the environment. A run of one process does not use the network.

    Args:
      init_timeout: seconds within which all processes must join.
      heartbeat_timeout: seconds after which a silent process counts as dead; the others end.
      barrier_timeout: seconds that the first process at a barrier waits for the others: before a
        program's first run (multihost.together), and at the end (close).
      stoppable: StopSignal will be used. SIGTERM then no longer ends the process by itself.

    Raises:
      UserError: not all processes joined in time; the environment is incomplete.
    """
    global _connection
    if jax.config.jax_num_cpu_devices > 1:
        # Collectives block threads of the pool that a process's CPU devices share. With the usual
        # one for each device, devices at different collectives deadlock.
        os.environ.setdefault("PJRT_NPROC", str(8 * jax.config.jax_num_cpu_devices))
    told = launcher.launcher_env(os.environ)
    if told is None and not launcher.in_cluster(os.environ):
        if jax.process_count() > 1:
            raise UserError(
                f"this is one of the {jax.process_count()} hosts of a TPU slice: set "
                f"{launcher.CLUSTER}=1 on all of them"
            )
        return
    if told is not None and told["process_id"] == 0:
        told |= coordinator.bind_address(told["coordinator_address"])
    jax.config.update("jax_enable_preemption_service", stoppable)
    relay = coordinator.connect(
        init_timeout,
        **(told or {}),
        heartbeat_timeout_seconds=int(heartbeat_timeout) + _JAX_IS_SLOWER,
        shutdown_timeout_seconds=int(barrier_timeout),
    )
    import orbax.checkpoint  # noqa: F401  # defines the flag

    if _ORBAX_BARRIER in flags.FLAGS:  # the alternative compiles and runs a program
        flags.FLAGS[_ORBAX_BARRIER].value = True
    watching = peers.Watch(client(), process_index(), process_count(), heartbeat_timeout, relay)
    _connection = _Connection(float(barrier_timeout), watching)
    watching.start()


def check_accelerators() -> None:
    """Checks that JAX uses the GPUs or TPUs that the cluster allocated; call it after start().

    Raises:
      UserError: JAX found only CPUs, and JAX_PLATFORMS does not choose them.
    """
    allocated = launcher.allocated_accelerators(os.environ)
    chose_cpu = (jax.config.jax_platforms or "").startswith("cpu")
    if allocated is None or chose_cpu or jax.default_backend() != "cpu":
        return
    setting, kind = allocated
    install = {
        "GPUs": "`bash launch/install.sh cuda12` (cuda13 with driver 580 or newer)",
        "TPUs": "`bash launch/install.sh tpu`",
    }[kind]
    raise UserError(
        f"{setting}: JAX finds only CPUs, but the job has {kind}; install JAX for them with "
        f"{install}, or set JAX_PLATFORMS=cpu to run on the CPUs"
    )


def process_index() -> int:
    """This process's number; needs no device."""
    return _jax_state.process_id


def process_count() -> int:
    return _jax_state.num_processes


def is_main() -> bool:
    """Whether this is process 0, the only one that prints and writes shared files."""
    return process_index() == 0


def is_started() -> bool:
    """Whether this is one of several processes, and connected to them."""
    return _connection is not None


def client() -> Any:
    """JAX's client of the coordination service; None in a run of one process."""
    return _jax_state.client


def default_timeout() -> float:
    """The barrier_timeout of start(), in seconds."""
    return _connection.barrier_timeout


def watch() -> peers.Watch | None:
    """The watch over the other processes; None in a run of one process."""
    return _connection.watch if _connection else None


def close() -> None:
    """Disconnects when all processes have reached this call."""
    global _connection
    if _connection:
        _connection.watch.close()
        try:
            jax.distributed.shutdown()
        except jax.errors.JaxRuntimeError:
            peers.say_and_exit(
                f"process {process_index()}: not all {process_count()} processes reached the end "
                f"within {_connection.barrier_timeout} s (config.distributed.barrier_timeout)",
                1,
            )
        _connection.watch.stop()
    _connection = None
