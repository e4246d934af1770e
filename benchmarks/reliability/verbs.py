"""Runs a verb, or a function, in a forked process with its own files and a time limit.

The parent has imported the package but initialized no JAX device, so a verb starts at once. The
child runs the code of `python -m esolm_jax.VERB`.
"""

import atexit
import collections
import dataclasses
import importlib
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence

OUTCOMES = ("identical", "clean error", "fell back", "silent", "traceback", "hang")
TIMEOUT = 300.0  # seconds until a verb counts as hanging
TRACEBACK = "Traceback (most recent call last)"


@dataclasses.dataclass
class Row:
    """Counts of OUTCOMES over the attempts of one kind.

    Attributes:
      what: the kind of attempt.
      counts: outcome -> number of attempts.
      examples: of faults, at most 20.
    """

    what: str
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    examples: list[str] = dataclasses.field(default_factory=list)

    def add(self, outcome: str, example: str = "", times: int = 1) -> None:
        self.counts[outcome] += times
        if outcome in ("silent", "traceback", "hang") and len(self.examples) < 20:
            self.examples.append(f"{outcome}: {example}")

    def to_json(self) -> dict:
        counts = {name: self.counts.get(name, 0) for name in OUTCOMES}
        attempts = sum(counts.values())
        return {"what": self.what, "attempts": attempts, **counts, "examples": self.examples}


@dataclasses.dataclass(frozen=True)
class Ended:
    """The end of a process: its exit code (negative: a signal; None: the time limit), its output,
    and the JSON-able value of a function."""

    code: int | None
    out: str
    err: str
    value: object = None

    @property
    def fault(self) -> str | None:
        """ "hang" or "traceback" (a crash is one), if it ended so; else None."""
        if self.code is None:
            return "hang"
        crashed = self.code < 0 and self.code not in (-signal.SIGKILL, -signal.SIGTERM)
        return "traceback" if crashed or TRACEBACK in self.err else None

    @property
    def is_clean_error(self) -> bool:
        """A non-zero exit code with one line that says why."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return self.fault is None and bool(self.code) and len(lines) == 1


class Child:
    """A forked process that runs `body()`; its group is killed with it."""

    def __init__(self, body: Callable[[], object], environment: dict[str, str] | None = None):
        self._folder = tempfile.TemporaryDirectory(prefix="reliability-")
        folder = pathlib.Path(self._folder.name)
        self._files = {name: folder / name for name in ("out", "err", "value")}
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run(body, self._files, environment or {})
        self._status: int | None = None

    def poll(self) -> bool:
        """Whether it has ended."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def signal(self, number: int) -> None:
        if not self.poll():
            os.kill(self.pid, number)

    def wait(self, timeout: float) -> Ended:
        """Waits; at the time limit kills it."""
        end, timed_out = time.monotonic() + timeout, False
        while not self.poll():
            if time.monotonic() > end:
                timed_out = True
                os.kill(self.pid, signal.SIGKILL)
                _, self._status = os.waitpid(self.pid, 0)
                break
            time.sleep(0.01)
        try:
            os.killpg(self.pid, signal.SIGKILL)  # workers that outlive it
        except ProcessLookupError:
            pass
        out, err = (
            path.read_text(errors="replace") if path.exists() else ""
            for path in (self._files["out"], self._files["err"])
        )
        value = self._files["value"]
        found = json.loads(value.read_text()) if value.exists() else None
        self._folder.cleanup()
        code = None if timed_out else os.waitstatus_to_exitcode(self._status)
        return Ended(code, out, err, found)


def _run(body, files: dict, environment: dict) -> None:
    """In the child: runs `body` and ends the process."""
    atexit._clear()  # those of the parent, which would delete its folders when a verb ends
    os.setsid()
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(files[name], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(environment)
    code = 1
    try:
        value = body()
        files["value"].write_text(json.dumps(value))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(verb: str, args: Sequence[str], environment: dict[str, str] | None = None) -> Child:
    """Starts `python -m esolm_jax.VERB ARGS`."""

    def body():
        from esolm_jax import cli

        module = importlib.import_module(f"esolm_jax.{verb}")
        sys.argv = [module.__file__, *map(str, args)]
        cli.run(module.main, module.CLI)

    return Child(body, environment)


def run(verb: str, args: Sequence[str], timeout: float = TIMEOUT) -> Ended:
    """Runs a verb to its end."""
    return start(verb, args).wait(timeout)


def call(function: Callable, *args, timeout: float = TIMEOUT):
    """The JSON-able value of a function, run in a child. RuntimeError if it fails."""
    ended = Child(lambda: function(*args)).wait(timeout)
    if ended.code != 0:
        raise RuntimeError(f"{function.__name__}: code {ended.code}: {ended.err}")
    return ended.value


def import_verbs() -> None:
    """Imports the modules of the verbs for all children; initializes no JAX device."""
    for verb in ("prepare", "train", "evaluate", "sample"):
        importlib.import_module(f"esolm_jax.{verb}")
