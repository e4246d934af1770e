"""SIGINT and SIGTERM end a verb with one line, at once, also while JAX compiles.

Python runs its handlers between two instructions of the main thread, so a signal that comes while
XLA compiles would wait for minutes. Here a thread sees it meanwhile (signal.set_wakeup_fd). While
training, distributed.StopSignal handles both signals: the run ends after the step, with a
checkpoint; the thread says so, and a second signal ends the process at once.
"""

import contextlib
import os
import signal
import threading
import time

from esolm_jax import failures

_PATIENCE = 1.0  # seconds that the main thread has to notice a signal
_SAME = 0.3  # seconds within which two signals are one: `timeout` sends each twice
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_noticed = threading.Event()


class Interrupted(KeyboardInterrupt):
    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def _raise(signum, frame):
    _noticed.set()
    raise Interrupted(signum)


def install() -> None:
    """Call once, in the main thread of a process that is a verb."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a script's background job
            signal.signal(number, _raise)


def finish() -> None:
    """The verb is at its end: signals no longer disturb what is being closed."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is _raise:
                signal.signal(number, signal.SIG_IGN)


def _watch(reader: int) -> None:
    first = None
    while True:
        (number,) = os.read(reader, 1)
        handler = signal.getsignal(number)
        if number not in _SIGNALS or handler is signal.SIG_IGN:
            continue
        if first is not None and time.monotonic() - first > _SAME:
            _end(number)
        elif first is None:
            first = time.monotonic()
            if handler is not _raise:
                _say("stopping after this step, with a checkpoint; again to end at once")
            elif not _noticed.wait(_PATIENCE):
                _end(number)


def _end(signum: int) -> None:
    _say(f"error: {failures.interrupted(signum)}")
    os._exit(128 + signum)


def _say(line: str) -> None:
    """Writes to the descriptor: sys.stderr may be locked by the thread that was interrupted."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())
