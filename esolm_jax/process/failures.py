"""Failures of a verb: one line on stderr and an exit code for each kind.

Exit codes of all verbs follow `sysexits.h` and shells:

    0    done
    1    an error in esolm_jax (with a traceback), a lost process, a NaN that JAX_DEBUG_NANS found
    2    bad input (config, flags, files, environment), damaged files, training that diverged
    71   out of memory (host or device)
    74   a file or folder cannot be read or written (full disk, read-only, path too long)
    130  interrupted (SIGINT)               143  terminated (SIGTERM)

Standard library only: this is imported before JAX, whose own import may fail.
"""

import dataclasses
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator

from esolm_jax.errors import UserError

BUG, BAD_INPUT, NO_MEMORY, NO_FILE = 1, 2, 71, 74


@dataclasses.dataclass(frozen=True)
class Failure:
    """One line for stderr and an exit code. `is_bug`: the traceback is printed, too."""

    line: str
    code: int
    is_bug: bool = False


def report(error: BaseException, path: str | None = None) -> int:
    """Prints the failure on stderr and returns the exit code. With ESOLM_TRACEBACK=1 every kind
    of failure has a traceback."""
    failure = describe(error, path)
    _close_progress_bars()
    print(f"error: {failure.line}", file=sys.stderr, flush=True)
    if failure.is_bug or wants_tracebacks():
        traceback.print_exception(error)
    return failure.code


def _close_progress_bars() -> None:
    """Closes progress bars, so that the line starts at the left margin."""
    tqdm = sys.modules.get("tqdm")
    for bar in list(getattr(tqdm.tqdm, "_instances", ())) if tqdm else ():
        bar.close()


def line_start() -> str:
    """A line break if a progress bar is open, else "". For a thread that ends the process: the
    main thread may be inside the bar, so the bar cannot be closed."""
    tqdm = sys.modules.get("tqdm")
    return "\n" if tqdm and getattr(tqdm.tqdm, "_instances", ()) else ""


def wants_tracebacks() -> bool:
    return os.environ.get("ESOLM_TRACEBACK") == "1"


def describe(error: BaseException, path: str | None = None) -> Failure:
    """Classifies an exception; `path` is named if the exception names no file."""
    interrupts = [one for one in _chain(error, context=True) if isinstance(one, KeyboardInterrupt)]
    if interrupts:  # they take precedence over errors raised during unwinding
        number = getattr(interrupts[0], "signum", signal.SIGINT)
        return Failure(interrupted(number), 128 + number)
    for one in _chain(error):
        for kind in (_user_error, _memory, _file, _platform, _environment, _package):
            if (failure := kind(one, path)) is not None:
                return failure
    return Failure(
        f"{type(error).__name__}: {_shortened(error)}; this is an error in esolm_jax: please "
        "report it with the command and the traceback",
        BUG,
        is_bug=True,
    )


def _chain(error: BaseException, *, context: bool = False) -> Iterator[BaseException]:
    """The exception, the members of a group, and its causes; with `context`, also the exceptions
    that were being handled when it was raised."""
    seen, left = set(), [error]
    while left:
        one = left.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        left += [*getattr(one, "exceptions", ()), one.__cause__]
        left += [one.__context__] if context else []


def _shortened(error: BaseException, limit: int = 300) -> str:
    return " ".join(str(error).split())[:limit] or "no message"


def _user_error(error, path) -> Failure | None:
    return Failure(str(error), BAD_INPUT) if isinstance(error, UserError) else None


def interrupted(signum: int) -> str:
    word = "interrupted" if signum == signal.SIGINT else "terminated"
    return f"{word} ({signal.Signals(signum).name}); results and checkpoints are complete"


_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|OUT_OF_MEMORY|bad_alloc")


def _memory(error, path) -> Failure | None:
    message = _shortened(error)
    of_device = isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(message)
    if not (isinstance(error, MemoryError) or of_device) or _os_error(error):
        return None
    what = "" if message == "no message" else f": {message}"
    return Failure(
        f"out of memory{what}; lower config.train.batch_size (or raise "
        "config.train.grad_accumulation), config.eval.batch_size, config.sample.num_texts or the "
        "length of texts",
        NO_MEMORY,
    )


_ADVICE = {
    errno.ENOSPC: "free some room there and run the same command again",
    errno.EDQUOT: "free some room there and run the same command again",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f) and run the same command again",
    errno.EROFS: "choose a writable folder",
    errno.EACCES: "choose a path with read and write permission",
    errno.EPERM: "choose a path with read and write permission",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files",
}
# TensorStore's (Orbax's backend) format: "… No space left on device [os_error_code='28']".
_OS_ERROR = re.compile(r"os_error_code='(\d+)'|\[OS error (\d+):")
_PLAIN = {os.strerror(number): number for number in _ADVICE}
_QUOTED = re.compile(r"""["'](/[^"']+)["']""")


def _os_error(error: BaseException) -> tuple[int, str] | None:
    """(errno, its text) quoted in an exception of C++ code."""
    message = str(error)
    if match := _OS_ERROR.search(message):
        number = int(match[1] or match[2])
        return number, os.strerror(number)
    for text, number in _PLAIN.items():
        if text in message:
            return number, text
    return None


def _file(error, path) -> Failure | None:
    if isinstance(error, OSError) and error.errno is not None:
        number, text = error.errno, error.strerror or os.strerror(error.errno)
        file = error.filename if isinstance(error.filename, str | bytes | os.PathLike) else None
        file = None if file is None else os.fsdecode(file)
    elif isinstance(error, OSError | RuntimeError | ValueError) and (found := _os_error(error)):
        (number, text), quoted = found, _QUOTED.search(str(error))
        file = quoted and quoted[1]
    else:
        return None
    advice = f"; {_ADVICE[number]}" if number in _ADVICE else ""
    return Failure(f"{file or path or 'a file'}: {text}{advice}", NO_FILE)


def _platform(error, path) -> Failure | None:
    """A platform (JAX_PLATFORMS) that is missing or cannot start."""
    message, trace = _shortened(error), error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    in_jax = trace is not None and trace.tb_frame.f_code.co_filename.endswith("xla_bridge.py")
    asked = os.environ.get("JAX_PLATFORMS", "")
    if in_jax and not isinstance(error, RuntimeError):  # a bare assertion, for CUDA
        message = f"no device of this kind was found ({type(error).__name__} in JAX)"
    elif not (
        isinstance(error, RuntimeError) and re.search("[Uu]n(able|known).* backend", message)
    ):
        return None
    return Failure(f"JAX_PLATFORMS={asked}: {message}", BAD_INPUT)


def _environment(error, path) -> Failure | None:
    """A JAX_… environment variable with a value that JAX rejects on import or use."""
    message = _shortened(error)
    if isinstance(error, ValueError) and re.search(r"JAX flag|environment '?JAX_", message):
        return Failure(f"environment: {message}", BAD_INPUT)
    if isinstance(error, FloatingPointError):
        return Failure(f"JAX_DEBUG_NANS or JAX_DEBUG_INFS: {message}", BUG)
    if isinstance(error, Warning):
        message = f"{type(error).__name__}: {message}"
        return Failure(f"PYTHONWARNINGS: warnings must not be errors: {message}", BAD_INPUT)
    if "Disallowed" in message and "transfer" in message:
        return Failure(f"JAX_TRANSFER_GUARD: {message}", BAD_INPUT)
    return None


_EXTRAS = {"onnx": "export", "flatbuffers": "export", "tokenizers": "interop"}


def _package(error, path) -> Failure | None:
    if not isinstance(error, ImportError) or (error.name or "esolm_jax").startswith("esolm_jax"):
        return None
    name = error.name.split(".")[0]
    extra = f"[{_EXTRAS[name]}]" if name in _EXTRAS else ""
    return Failure(f"package {name}: {_shortened(error)}; pip install -e '.{extra}'", BAD_INPUT)
