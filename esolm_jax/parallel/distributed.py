"""Many processes: how they meet, agree, stop together, and end when one of them is lost.

A run of one process goes through the same calls, which then do nothing. The order of a run:

    with guard():                     # around all that follows
        start(...)                    # before anything asks JAX for a device
        check_same({"config": config_hash(config), "code version": code_hash()}, ...)
        ...                           # is_main() writes and prints; StopSignal ends training
"""

import contextlib
import errno
import hashlib
import ipaddress
import itertools
import json
import os
import pathlib
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import flags

# JAX has no public barrier with a timeout, and no public process id without a backend.
from jax._src import distributed as _jax_distributed
from jax._src.distributed import global_state as _jax_state
from jax.experimental import multihost_utils

from esolm_jax.errors import UserError
from esolm_jax.parallel import peers
from esolm_jax.parallel.relay import Relay
from esolm_jax.process import failures

ENV_VARS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
CLUSTER = "ESOLM_CLUSTER"  # "1": JAX itself is to find out which cluster this is
_JAX_IS_SLOWER = 30  # seconds between peers.py's detection of a dead process and JAX's abort
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES")
_LOST = re.compile(
    "Gloo .* failed|NCCL|coordination service|heartbeat|UNAVAILABLE:|Socket closed|by peer"
)

_GLOO_SETUP = "Gloo context initialization failed"
_ORBAX_BARRIER = "experimental_orbax_use_distributed_barrier"

_started = False  # as one of several processes, and connected to them
_barrier_timeout = 300.0  # seconds, of start()
_calls = itertools.count()  # of gather() and others: all processes make the same ones
_watch: peers.Watch | None = None


def start(
    *, init_timeout: int, heartbeat_timeout: int, barrier_timeout: int, stoppable: bool = False
) -> None:
    """Joins the other processes of the run, if the environment says that there are any.

    Told by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by a cluster that
    JAX knows (SLURM, Open MPI, TPU workers named in the environment, or anything with
    ESOLM_CLUSTER=1, as TPU pods and Kubernetes need). Otherwise nothing is asked of the network.

    Args:
      init_timeout: seconds until all processes must be there.
      heartbeat_timeout: seconds after which a silent process counts as dead; the others end.
      barrier_timeout: seconds that the first process at a program's first run (together), or at
        the end (close), waits for the others.
      stoppable: StopSignal will be used. SIGTERM then no longer ends the process by itself.

    Raises:
      UserError: the processes did not come together; the environment tells only a part.
    """
    global _started, _barrier_timeout, _watch
    if jax.config.jax_num_cpu_devices > 1:
        # Collectives block threads of the pool that a process's CPU devices share. With the usual
        # one for each device, devices that are at different collectives wait for ever.
        os.environ.setdefault("PJRT_NPROC", str(8 * jax.config.jax_num_cpu_devices))
    told = _launcher_env(os.environ)
    if told is None and not _in_cluster(os.environ):
        if jax.process_count() > 1:
            raise UserError(
                f"this is one of the {jax.process_count()} hosts of a TPU slice: set {CLUSTER}=1 "
                "on all of them"
            )
        return
    if told is not None and told["process_id"] == 0:
        told |= _bind_address(told["coordinator_address"])
    jax.config.update("jax_enable_preemption_service", stoppable)
    relay = _connect(
        init_timeout,
        **(told or {}),
        heartbeat_timeout_seconds=int(heartbeat_timeout) + _JAX_IS_SLOWER,
        shutdown_timeout_seconds=int(barrier_timeout),
    )
    if _ORBAX_BARRIER in flags.FLAGS:  # the alternative compiles and runs a program
        flags.FLAGS[_ORBAX_BARRIER].value = True
    _started, _barrier_timeout = True, float(barrier_timeout)
    _watch = peers.Watch(
        _jax_state.client, process_index(), process_count(), heartbeat_timeout, relay
    )
    _watch.start()


def _launcher_env(environment: Mapping[str, str]) -> dict | None:
    """What the launcher says of this process: arguments of jax.distributed.initialize."""
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
        raise UserError(f"JAX_PROCESS_ID={index}: must lie in 0..{int(count) - 1}")
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
    told = _launcher_env(os.environ)
    if told is not None:
        return f"JAX_NUM_PROCESSES={told['num_processes']}" if told["num_processes"] > 1 else None
    without_hosts = {k: v for k, v in os.environ.items() if k not in _TPU_HOSTS}
    return "the environment of this process" if _in_cluster(without_hosts) else None


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether jax.distributed.initialize() will find several processes without being told."""

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


def _bind_address(address: str) -> dict[str, str]:
    """The address that the coordinator binds to: the loopback or IP address given.

    For any other name (hosts may resolve it differently) it binds to all interfaces, as JAX does.
    JAX_COORDINATOR_BIND_ADDRESS overrides both.

    Raises:
      UserError: the port is in use (JAX's server would crash this process).
    """
    host, port = address.rsplit(":", 1)
    found = _addresses(host.strip("[]"), int(port))
    if not found or os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
        family, at, bound = socket.AF_INET6, ("", int(port)), {}
    else:
        family, at = found
        literal = f"[{at[0]}]" if family == socket.AF_INET6 else at[0]
        bound = {"coordinator_bind_address": f"{literal}:{port}"}
    try:
        with socket.socket(family) as test:
            test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            test.bind(at)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS={address}: the port is in use on this host"
            ) from error
        return {}  # an address of a proxy, not of this host
    return bound


def _addresses(host: str, port: int) -> tuple[int, tuple] | None:
    """Family and socket address of an IP address or of "localhost"; None for another name."""
    try:
        name = "127.0.0.1" if host == "localhost" else str(ipaddress.ip_address(host))
        family, *_, at = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
    except (OSError, ValueError):
        return None
    return family, at


def _connect(timeout: float, **arguments) -> Relay | None:
    """jax.distributed.initialize, through a Relay except in process 0.

    Raises:
      UserError: it takes longer than `timeout`, or fails.
    """
    problems, relays = [], []
    make_client = _jax_distributed._jax.get_distributed_runtime_client

    def make_client_through_relay(address, index, *args, **kwargs):
        if index > 0:
            relays.append(Relay(address, index))
            address = relays[0].target
        return make_client(address, index, *args, **kwargs)

    def connect():
        try:
            _jax_distributed._jax.get_distributed_runtime_client = make_client_through_relay
            # JAX's own timeout aborts the process with a stack trace, so it has to come later.
            jax.distributed.initialize(initialization_timeout=int(timeout) + 60, **arguments)
        except Exception as error:  # to be raised by the thread that waits
            problems.append(error)
        finally:
            _jax_distributed._jax.get_distributed_runtime_client = make_client

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        for relay in relays:
            relay.stop()
        raise UserError(_nobody(timeout))
    if problems:
        raise UserError(f"cannot join the other processes: {problems[0]}") from problems[0]
    for relay in relays:
        relay.joined()
    return relays[0] if relays else None


def _nobody(timeout: float) -> str:
    """Why no connection came about."""
    index, address = process_index(), _jax_state.coordinator_address
    if address is None:
        return f"cluster not understood within {timeout} s (config.distributed.init_timeout)"
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except OSError:
        return (
            f"process {index}: no coordinator (process 0) answers at {address} within {timeout} s "
            "(config.distributed.init_timeout)"
        )
    return (
        f"process {index}: not all {process_count()} processes came to the coordinator at "
        f"{address} within {timeout} s (config.distributed.init_timeout)"
    )


def process_index() -> int:
    """This process's number; needs no device."""
    return _jax_state.process_id


def process_count() -> int:
    return _jax_state.num_processes


def is_main() -> bool:
    """Whether this is the process that prints, and writes what only one may write."""
    return process_index() == 0


def barrier(name: str, *, timeout: float) -> None:
    """Returns when every process is here.

    Raises:
      UserError: not all of them came within `timeout` seconds.
    """
    if not _started:
        return
    try:
        _jax_state.client.wait_at_barrier(name, int(1000 * timeout))
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"process {process_index()}: not all {process_count()} processes came to {name!r} "
            f"within {timeout} s (config.distributed.barrier_timeout)"
        ) from error


def is_started() -> bool:
    """Whether this is one of several processes, and connected to them."""
    return _started


def gather(value: str, *, timeout: float | None = None) -> list[str]:
    """The values of all processes, in order of process; all must make the same calls.

    Args:
      timeout: seconds to wait for the others; by default the barrier_timeout of start().

    Raises:
      UserError: as barrier().
    """
    if not _started:
        return [value]
    place = f"esolm_jax/same/{next(_calls)}"
    _jax_state.client.key_value_set(f"{place}/{process_index():08}", value)
    barrier(place, timeout=_barrier_timeout if timeout is None else timeout)
    return [said for _, said in sorted(_jax_state.client.key_value_dir_get(place))]


def from_main(value: str) -> str:
    """Process 0's value, in all processes."""
    return gather(value)[0]


def check_same(what: Mapping[str, str], *, timeout: float) -> None:
    """Compares e.g. {"config": hash} between all processes.

    Raises:
      UserError: they differ, with the same message in every process; or as barrier().
    """
    if not _started:
        return
    said = [json.loads(value) for value in gather(json.dumps(dict(what)), timeout=timeout)]
    differences = []
    for name in dict.fromkeys(name for one in said for name in one):
        holders: dict[str, list[int]] = {}
        for index, one in enumerate(said):
            holders.setdefault(one.get(name, "none"), []).append(index)
        if len(holders) > 1:
            held = ", ".join(f"{value} on {_processes(on)}" for value, on in holders.items())
            differences.append(f"{name} differs between hosts: {held}")
    if differences:
        raise UserError("; ".join(differences))


def on_main(action: Callable[[], Any]) -> Any:
    """Process 0 runs action() and returns its result; the others wait, and return None.

    They wait without a time limit while process 0 is alive.

    Raises:
      UserError: action() raised UserError or OSError; the message is the same in every process.
    """
    if not _started:
        return action()
    client, key = _jax_state.client, f"esolm_jax/on_main/{next(_calls)}"
    if is_main():
        try:
            result = action()
        except (UserError, OSError) as error:
            client.key_value_set(key, json.dumps(failures.describe(error).line))
            raise
        client.key_value_set(key, json.dumps(None))
        return result
    while True:
        try:
            said = json.loads(client.blocking_key_value_get(key, 60_000))
            break
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
    if said is not None:
        raise UserError(said)
    return None


def together(jitted: Callable) -> Callable:
    """A jitted function whose first run on arguments of new shapes begins in all processes at once.

    The first collective of a program connects the processes that take part, and Gloo gives them
    30 s. So each process compiles the program first, then waits for the others. In a single process
    this returns `jitted` itself. In many processes, all must make the same calls.
    """
    if not _started:
        return jitted
    compiled: dict[tuple, Callable] = {}

    def call(*args):
        leaves, tree = jax.tree.flatten(args)
        key = tree, *((getattr(a, "shape", ()), getattr(a, "dtype", type(a))) for a in leaves)
        if key not in compiled:
            program = jitted.lower(*args).compile()
            name = getattr(jitted, "__name__", "a program")
            barrier(f"first run of {name} ({next(_calls)})", timeout=_barrier_timeout)
            compiled[key] = program
        return compiled[key](*args)

    return call


def _processes(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:8])) + (", …" if len(indices) > 8 else "")
    return f"process{'es' if len(indices) > 1 else ''} {shown}"


def config_hash(config) -> str:
    """Twelve hex digits that follow from all fields of a ConfigDict."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code_hash() -> str:
    """Twelve hex digits that follow from the source files of this package."""
    root = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(source)}\n".encode() + source)
    return digest.hexdigest()[:12]


class StopSignal:
    """SIGTERM or SIGINT to any process ends training in all of them after the same step.

    A second SIGINT (of one process alone: also SIGTERM) ends it at once. Several processes need
    start(stoppable=True): JAX's own handler of SIGTERM then tells the others, within seconds.
    """

    def __init__(self):
        self._received: int | None = None
        self._many = _started and process_count() > 1
        for number in (signal.SIGINT,) if self._many else (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        del frame
        self._received = number
        signal.signal(number, signal.SIG_DFL)
        if self._many:
            os.kill(os.getpid(), signal.SIGTERM)

    def after(self, step: int) -> int | None:
        """The signal's number if all processes are to stop after `step`; ask at every step."""
        if not self._many:
            return self._received
        if multihost_utils.reached_preemption_sync_point(step):
            return self._received or signal.SIGTERM
        return None


@contextlib.contextmanager
def guard():
    """Ends this process when it or another one fails. In a single process, errors pass through.

    In many processes an exception prints a line on stderr and announces the failure to the other
    processes, which then end with the same reason. This process exits without JAX's shutdown
    barrier, with a code of failures.py; the code for a lost peer is 1. A killed process announces
    nothing: a collective fails in the others (at once on CPUs), or peers.py detects the silence.
    """
    try:
        yield
    except SystemExit:  # a planned end, in all processes
        close()
        raise
    except BaseException as error:
        if _jax_state.client is None:
            raise
        _fail(error)
    else:
        close()


def _fail(error: BaseException):
    if _watch:
        _watch.leaving.set()
    failure, name = failures.describe(error), f"process {process_index()}"
    said, word, code = failure.line, peers.Word(f"{name}: {failure.line}"), failure.code
    if isinstance(error, UserError):  # possibly the same in all processes
        pass
    elif isinstance(error, Exception) and _LOST.search(str(error)):
        code, said = 1, _lost_a_peer(f"{name}: {type(error).__name__}: {error}")
        word = peers.Word(said, is_echo=True)
    else:
        said = word.text
        if failure.is_bug or failures.wants_tracebacks():
            traceback.print_exception(error)
    peers.say(said)
    if _watch and not _watch.coordinator_is_lost:
        leave = threading.Thread(target=_announce_failure, args=(word, code == 2), daemon=True)
        leave.start()
        leave.join(peers.LINGER + 1)  # the coordinator may be lost
    peers.exit_now(code)


def _lost_a_peer(error: str) -> str:
    """The message for an error that only shows that another process is gone."""
    name, error = f"process {process_index()}", " ".join(error.split())[:300]
    if _watch and _watch.failed.wait(1) and not _watch.word.is_echo:
        return f"{name} lost a peer: {_watch.word.text}"
    if _GLOO_SETUP in error:
        return f"{name}: another process did not begin the same program within 30 s ({error})"
    return f"{name} lost a peer, which was killed or crashed ({error})"


def _announce_failure(word: peers.Word, all_may_say_so: bool) -> None:
    """Announces the failure; process 0, which runs the service, waits until the others read it."""
    _watch.tell(word)
    if all_may_say_so:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _jax_state.client.wait_at_barrier("esolm_jax/leave", 1000 * peers.LINGER)
            _watch.close()
            jax.distributed.shutdown()
    elif is_main():
        time.sleep(peers.LINGER)


def close() -> None:
    """Disconnects when all processes have reached this call."""
    global _started
    if _started:
        _watch.close()
        try:
            jax.distributed.shutdown()
        except jax.errors.JaxRuntimeError:
            peers.say_and_exit(
                f"process {process_index()}: not all {process_count()} processes came to the end "
                f"within {_barrier_timeout} s (config.distributed.barrier_timeout)",
                1,
            )
        _watch.stop()
    _started = False
