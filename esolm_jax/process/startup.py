"""Setup before `python -m esolm_jax.VERB` imports JAX.

The import of JAX takes seconds, can be interrupted, and fails for a bad environment variable. So
streams, signal handlers and the exception hook are set first; cli.run takes over later.
"""

import atexit
import os
import re
import sys
import threading
import time

from esolm_jax.errors import UserError
from esolm_jax.process import failures, interrupts, standard_streams

STARTED_AT = time.monotonic()  # the package imports this module first

is_running = False  # a verb, in this process
thread_errors: list[BaseException] = []  # of threads that are not joined


def is_verb() -> bool:
    """Whether Python is about to run a module of this package: `python -m esolm_jax.VERB`."""
    modules = (re.search(r"^(?:-\w*m)?esolm_jax\.\w", arg) for arg in sys.orig_argv[1:])
    return sys.argv[:1] == ["-m"] and any(modules)


def begin() -> None:
    global is_running
    is_running = True
    standard_streams.install()
    sys.excepthook = lambda kind, error, trace: end(failures.report(error))
    threading.excepthook = _of_thread
    check_xla_flags()
    interrupts.install()


def end(code: int) -> None:
    """Ends the process immediately, without cleanup."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave(code: int | None) -> None:
    """Ends a verb as sys.exit, but without the interpreter's teardown, which takes half a second;
    functions that call a verb return from this one. All files must be closed."""
    if is_running:
        atexit._run_exitfuncs()
        end(code or 0)


def _of_thread(args) -> None:
    """Prints a thread's failure immediately; cli.run then returns its exit code."""
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        thread_errors.append(args.exc_value)
        failures.report(args.exc_value)


def check_xla_flags() -> None:
    """UserError for XLA_FLAGS that XLA rejects.

    XLA parses them once and aborts the process on an error, so a forked child parses them first.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if not given.strip():
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # as JAX does before this import
    from jaxlib import xla_client  # imported by JAX in any case

    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writer, 2)
        xla_client.CompileOptions()
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8", errors="replace") as file:
        message = file.read()
    if os.waitpid(child, 0)[1]:
        lines = [re.sub(r"^[EF]\d+ .*?\] ", "", line) for line in message.splitlines()]
        reason = next((line for line in lines if line.strip()), "refused by XLA")
        raise UserError(f"XLA_FLAGS={given}: {reason[:300]}")
