"""What happens before `python -m esolm_jax.VERB` imports anything large.

Importing JAX takes seconds, in which a person may interrupt, and fails for a bad value in the
environment. So streams, signals and the hook for errors are set first; cli.run takes over later.
"""

import os
import re
import sys
import threading

from esolm_jax import failures, interrupts, standard_streams
from esolm_jax.errors import UserError

thread_errors: list[BaseException] = []  # of threads that nobody waits for


def is_verb() -> bool:
    """Whether Python is about to run a module of this package: `python -m esolm_jax.VERB`."""
    modules = (re.search(r"^(?:-\w*m)?esolm_jax\.\w", arg) for arg in sys.orig_argv[1:])
    return sys.argv[:1] == ["-m"] and any(modules)


def begin() -> None:
    standard_streams.install()
    sys.excepthook = lambda kind, error, trace: end(failures.report(error))
    threading.excepthook = _of_thread
    check_xla_flags()
    interrupts.install()


def end(code: int) -> None:
    """Ends the process now: nothing that is left needs closing."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _of_thread(args) -> None:
    """One line for a thread's failure when it happens; cli.run ends with an exit code for it."""
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        thread_errors.append(args.exc_value)
        failures.report(args.exc_value)


def check_xla_flags() -> None:
    """UserError for XLA_FLAGS that XLA does not accept: it would end the process without a word.

    XLA reads them once, and exits where it cannot; so a forked child reads them first.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if not given.strip():
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # as JAX sets it before it imports this
    from jaxlib import xla_client  # all the work that this costs has to be done anyway

    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writer, 2)
        xla_client.CompileOptions()
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8", errors="replace") as file:
        told = file.read()
    if os.waitpid(child, 0)[1]:
        lines = [re.sub(r"^[EF]\d+ .*?\] ", "", line) for line in told.splitlines()]
        reason = next((line for line in lines if line.strip()), "refused by XLA")
        raise UserError(f"XLA_FLAGS={given}: {reason[:300]}")
