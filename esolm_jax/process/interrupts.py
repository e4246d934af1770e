"""SIGINT and SIGTERM end a verb with one line, immediately, also while JAX compiles.

Python runs signal handlers between two instructions of the main thread, so a signal during an XLA
compilation would wait for minutes. Here a thread receives it (signal.set_wakeup_fd). During
training, parallel/stop_signal.py handles both signals: the run ends after the step, with a
checkpoint. The thread prints this, and a second signal ends the process immediately.
"""

import contextlib
import os
import select
import signal
import threading
import time

from esolm_jax.process import failures

_NOTICE = 1.0  # seconds for the main thread to handle a signal
_LEAVE = 10.0  # seconds to unwind; a library may catch the exception
_AGAIN = 0.05  # seconds until a dropped signal is raised again
_SAME = 0.3  # seconds; closer signals count as one, because `timeout` sends each twice
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DROPS = ("__del__", "_xla_gc_callback")  # functions whose exceptions Python prints and drops
_noticed, _finished = threading.Event(), threading.Event()


class Interrupted(KeyboardInterrupt):
    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def _raise(signum, frame):
    while frame is not None:
        if frame.f_code.co_name in _DROPS:
            threading.Timer(_AGAIN, os.kill, (os.getpid(), signum)).start()
            return
        frame = frame.f_back
    _noticed.set()
    raise Interrupted(signum)


def install() -> None:
    """Call once, in the main thread of a verb."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a script's background job
            signal.signal(number, _raise)


def finish() -> None:
    """Call at the end of the verb: a signal now ends the process, without an exception."""
    _finished.set()
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is _raise:
                signal.signal(number, signal.SIG_DFL)  # ends a process whose cleanup hangs


def _watch(reader: int) -> None:
    first = number = None
    limits: list[float] = []  # deadlines of the main thread
    while True:
        wait = max(0.0, limits[0] - time.monotonic()) if limits else None
        if not select.select([reader], [], [], wait)[0]:
            limits.pop(0)
            if not (_noticed if limits else _finished).is_set():
                _end(number)
            continue
        (number,) = os.read(reader, 1)
        handler = signal.getsignal(number)
        if number not in _SIGNALS or handler is signal.SIG_IGN:
            continue
        now = time.monotonic()
        if first is not None and now - first > _SAME:
            _end(number)
        elif first is None:
            first = now
            if handler is _raise:
                limits = [now + _NOTICE, now + _LEAVE]
            else:
                _print_line("stopping after this step, with a checkpoint; again to end immediately")


def _end(signum: int) -> None:
    _print_line(f"error: {failures.interrupted(signum)}")
    os._exit(128 + signum)


def _print_line(line: str) -> None:
    """Writes to the descriptor: the interrupted thread may hold the lock of sys.stderr."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())
