"""The lease of a lock: which process holds it, and whether that process is alive."""

import dataclasses
import os
import pathlib
import re
import shlex
import signal
import socket
import sys
import time
import uuid


@dataclasses.dataclass(frozen=True)
class Lease:
    """The holder of a lock.

    Attributes:
      token: unique to this acquisition. beat: version number. machine: equal for processes that see
        each other's process ids. started: start time of the process, in clock ticks since boot.
    """

    token: str
    host: str
    machine: str
    pid: int
    started: str
    since: str
    command: str
    beat: int = 0

    @classmethod
    def of_this_process(cls) -> "Lease":
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_started(os.getpid()) or "",
            since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
            command=shlex.join(getattr(sys, "orig_argv", sys.argv)),
        )

    def __str__(self) -> str:
        shown = " ".join(self.command.split())
        shown = f"{shown[:200]}…" if len(shown) > 200 else shown
        return f"process {self.pid} on host {self.host} since {self.since}: {shown}"

    def is_here(self) -> bool:
        """Whether its process id is valid in this process's namespace."""
        return self.machine == _machine()

    def is_alive(self) -> bool:
        """Whether the holder is running; for a lease that is_here()."""
        started = _started(self.pid)
        return started is not None and started == self.started


def _read_text(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _machine() -> str:
    """An id that is equal exactly for processes that see each other's process ids."""
    boot = _read_text("/proc/sys/kernel/random/boot_id") or str(uuid.getnode())
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {boot} {namespace}".strip()


def _started(pid: int) -> str | None:
    """When a process of this machine started, or None if it has ended or is being killed."""
    if not os.path.isdir("/proc/self"):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:  # another user's
            pass
        return ""
    # Fields after the command, which may contain spaces and brackets: state, …, start time.
    fields = _read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    pending = re.findall(r"^S\w+Pnd:\s*(\w+)", _read_text(f"/proc/{pid}/status"), re.M)
    is_killed = any(int(mask, 16) >> (signal.SIGKILL - 1) & 1 for mask in pending)
    return None if not fields or fields[0] in "ZX" or is_killed else fields[19]
