"""Ends this process, and with it the run, when it or another process fails."""

import contextlib
import re
import threading
import time
import traceback

import jax

from esolm_jax.errors import UserError
from esolm_jax.parallel import distributed, peers
from esolm_jax.process import failures

_LOST = re.compile(
    "Gloo .* failed|NCCL|coordination service|heartbeat|UNAVAILABLE:|Socket closed|by peer"
)
_GLOO_SETUP = "Gloo context initialization failed"


@contextlib.contextmanager
def guard():
    """Ends this process when it or another one fails. In a single process, errors pass through.

    In many processes an exception prints a line on stderr and announces the failure to the other
    processes, which then end with the same reason. This process exits without JAX's shutdown
    barrier, with a code of failures.py; the code for a lost peer is 1. A killed process announces
    nothing: a collective fails in the others (immediately on CPUs), or peers.py
    detects the silence.
    """
    try:
        yield
    except SystemExit:  # a planned end, in all processes
        distributed.close()
        raise
    except BaseException as error:
        if distributed.client() is None:
            raise
        _fail(error)
    else:
        distributed.close()


def _fail(error: BaseException):
    watch = distributed.watch()
    if watch:
        watch.leaving.set()
    failure, name = failures.describe(error), f"process {distributed.process_index()}"
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
    if watch and not watch.coordinator_is_lost:
        leave = threading.Thread(target=_announce_failure, args=(word, code == 2), daemon=True)
        leave.start()
        leave.join(peers.LINGER + 1)  # the coordinator may be lost
    peers.exit_now(code)


def _lost_a_peer(error: str) -> str:
    """The message for an error that only shows that another process is gone."""
    name, error = f"process {distributed.process_index()}", " ".join(error.split())[:300]
    watch = distributed.watch()
    if watch and watch.failed.wait(1) and not watch.word.is_echo:
        return f"{name} lost a peer: {watch.word.text}"
    if _GLOO_SETUP in error:
        return f"{name}: another process did not begin the same program within 30 s ({error})"
    return f"{name} lost a peer, which was killed or crashed ({error})"


def _announce_failure(word: peers.Word, all_may_say_so: bool) -> None:
    """Announces the failure; process 0, which runs the service, waits until the others read it."""
    watch = distributed.watch()
    watch.tell(word)
    if all_may_say_so:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            distributed.client().wait_at_barrier("esolm_jax/leave", 1000 * peers.LINGER)
            watch.close()
            jax.distributed.shutdown()
    elif distributed.is_main():
        time.sleep(peers.LINGER)
