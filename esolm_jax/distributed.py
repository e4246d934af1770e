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
import itertools
import json
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping

import jax

# JAX has no public barrier with a timeout, and no public process id without a backend.
from jax._src.distributed import global_state as _jax_state
from jax.experimental import multihost_utils

from esolm_jax import failures
from esolm_jax.errors import UserError

TOLD_BY = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
CLUSTER = "ESOLM_CLUSTER"  # "1": JAX itself is to find out which cluster this is
_FAILED = "esolm_jax/failed"  # key under which the first process to fail says why
_FOREVER = 2**31 - 1  # milliseconds: 24 days
_LINGER = 2  # seconds that a failed process waits for the others, where that makes sense
_LOST = re.compile(
    "Gloo .* failed|NCCL|coordination service|heartbeat|UNAVAILABLE:|Socket closed|by peer"
)

_started = False  # as one of several processes, and connected to them
_barrier_timeout = 300.0  # seconds, of start()
_calls = itertools.count()  # of check_same: all processes make the same ones


def start(
    *, init_timeout: int, heartbeat_timeout: int, barrier_timeout: int, stoppable: bool = False
) -> None:
    """Joins the other processes of the run, if the environment says that there are any.

    Told by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by a cluster that
    JAX knows (SLURM, Open MPI, TPU workers named in the environment, or anything with
    ESOLM_CLUSTER=1, as TPU pods and Kubernetes need). Otherwise nothing is asked of the network.

    Args:
      init_timeout: seconds until all processes must be there.
      heartbeat_timeout: seconds after which a silent process counts as dead; the others abort.
      barrier_timeout: seconds that the first process to end waits for the others, in close().
      stoppable: StopSignal will be used. SIGTERM then no longer ends the process by itself.

    Raises:
      UserError: the processes did not come together; the environment tells only a part.
    """
    global _started, _barrier_timeout
    if jax.config.jax_num_cpu_devices > 1:
        # Collectives block threads of the pool that a process's CPU devices share. With the usual
        # one for each device, devices that are at different collectives wait for ever.
        os.environ.setdefault("PJRT_NPROC", str(8 * jax.config.jax_num_cpu_devices))
    told = _told(os.environ)
    if told is None and not _in_cluster(os.environ):
        if jax.process_count() > 1:
            raise UserError(
                f"this is one of the {jax.process_count()} hosts of a TPU slice: set {CLUSTER}=1 "
                "on all of them"
            )
        return
    if told is not None and told["process_id"] == 0:
        _check_port(told["coordinator_address"])
    jax.config.update("jax_enable_preemption_service", stoppable)
    _connect(
        init_timeout,
        **(told or {}),
        heartbeat_timeout_seconds=int(heartbeat_timeout),
        shutdown_timeout_seconds=int(barrier_timeout),
    )
    _started, _barrier_timeout = True, float(barrier_timeout)
    _peer.start()


def _told(environment: Mapping[str, str]) -> dict | None:
    """What the launcher says of this process: arguments of jax.distributed.initialize."""
    missing = [name for name in TOLD_BY if not environment.get(name)]
    if len(missing) == len(TOLD_BY):
        return None
    if missing:
        raise UserError(
            f"{', '.join(missing)}: missing from the environment; give all of "
            f"{', '.join(TOLD_BY)}, or none for one process"
        )
    address, count, index = (environment[name] for name in TOLD_BY)
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


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether jax.distributed.initialize() will find several processes without being told."""

    def number(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdecimal() else 1

    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    return (
        environment.get(CLUSTER) == "1"
        or (all(name in environment for name in slurm) and number("SLURM_NTASKS") > 1)
        or ("OMPI_MCA_orte_hnp_uri" in environment and number("OMPI_COMM_WORLD_SIZE") > 1)
        or "," in (workers or "")
        or number("MEGASCALE_NUM_SLICES") > 1
    )


def _check_port(address: str) -> None:
    """The coordinator's port must be free: JAX's server would crash the process."""
    try:
        with socket.socket(socket.AF_INET6) as test:
            test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            test.bind(("", int(address.rsplit(":", 1)[1])))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS={address}: the port is in use on this host"
            ) from error


def _connect(timeout: float, **arguments) -> None:
    """jax.distributed.initialize, with a UserError when it takes longer than `timeout`."""
    problems = []

    def connect():
        try:
            # JAX's own timeout aborts the process with a stack trace, so it has to come later.
            jax.distributed.initialize(initialization_timeout=int(timeout) + 60, **arguments)
        except Exception as error:  # to be raised by the thread that waits
            problems.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise UserError(_nobody(timeout))
    if problems:
        raise UserError(f"cannot join the other processes: {problems[0]}") from problems[0]


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
    """The values of all processes, in their order; all of them make the same calls.

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


def _processes(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:8])) + (", …" if len(indices) > 8 else "")
    return f"process{'es' if len(indices) > 1 else ''} {shown}"


def config_hash(config) -> str:
    """Twelve hex digits that follow from all fields of a ConfigDict."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code_hash() -> str:
    """Twelve hex digits that follow from the source files of this package."""
    root = pathlib.Path(__file__).parent
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
    """Ends this process soundly when it, or another one, fails; alone, errors just pass through.

    In many processes an exception becomes a message on stderr here, word to the others (which
    end too, saying why), and an exit without JAX's farewell, for which everybody would wait:
    code 2 for a UserError, 1 for a lost peer and for anything unforeseen. A process that was
    killed can send no word. Then a collective fails in the others (CPU, at once), or JAX aborts
    them after `heartbeat_timeout`, with its own message.
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
    _peer.leaving.set()
    code, name = 1, f"process {process_index()}"
    if isinstance(error, UserError):
        code, said, word = 2, str(error), f"{name}: {error}"
    else:
        failure = failures.describe(error)
        said = word = f"{name}: {failure.line}"
        if not _LOST.search(str(error)):
            code = failure.code
            if failure.is_bug or failures.wants_tracebacks():
                traceback.print_exception(error)
        elif _started and _peer.failed.wait(1):
            said = f"{name} lost a peer: {_peer.word}"
        else:
            said = word = f"{name} lost a peer, which said nothing ({said})"
    print(f"error: {said}", file=sys.stderr, flush=True)
    if _started:
        leave = threading.Thread(target=_leave, args=(word, code == 2), daemon=True)
        leave.start()
        leave.join(_LINGER + 1)  # the coordinator itself may be lost
    _exit(code)


def _leave(word: str, all_may_say_so: bool) -> None:
    """Sends word to the others; process 0, through which it goes, gives them time to hear it."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # somebody was faster
        _jax_state.client.key_value_set(_FAILED, word)
    if all_may_say_so:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _jax_state.client.wait_at_barrier("esolm_jax/leave", 1000 * _LINGER)
            jax.distributed.shutdown()
    elif is_main():
        time.sleep(_LINGER)


class _Peer:
    """A thread that waits for the word that some process failed, and then ends this one."""

    def __init__(self):
        self.failed, self.word = threading.Event(), ""
        self.leaving = threading.Event()  # the main thread sees to it
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join(5)  # one left in a call to JAX would crash the interpreter at its end

    def _watch(self) -> None:
        try:
            self.word = _jax_state.client.blocking_key_value_get(_FAILED, _FOREVER)
        except jax.errors.JaxRuntimeError:
            return  # the run is over, or the coordinator is lost, which JAX deals with
        self.failed.set()
        # Time for the main thread to say it better; process 0 outlives the one that failed.
        if not self.leaving.wait(1 + _LINGER if is_main() else 1):
            print(f"error: process {process_index()} lost a peer: {self.word}", file=sys.stderr)
            _exit(1)


_peer = _Peer()


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def close() -> None:
    """Says goodbye to the other processes, when all of them have come to their end."""
    global _started, _barrier_timeout
    if _started:
        jax.distributed.shutdown()
        _peer.join()
    _started = False
