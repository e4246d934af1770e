"""Detects that another process of the run failed or died, and ends this one with one line.

JAX aborts the survivors itself, but later and with a stack trace. Three signs come earlier:

  word     a failing process writes its reason to the coordination service before it exits
  silence  every process increments a counter there every few seconds; process 0 watches the
           counters, and the other processes notice when process 0 stops answering
  close    the connection to process 0 was closed (relay.py)
"""

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time

import jax

from esolm_jax.parallel.relay import Relay
from esolm_jax.process import failures

LINGER = 2  # seconds that process 0, which runs the service, stays up after a failure
_FAILED = "esolm_jax/failed"  # key of the first failure and its reason
_BEAT = "esolm_jax/beat"
_FOREVER = 2**31 - 1  # milliseconds: 24 days


@dataclasses.dataclass(frozen=True)
class Word:
    """The reason why a process ends. `is_echo`: it ends because another process ended."""

    text: str
    is_echo: bool = False


class Watch:
    """Threads that watch the other processes from start() to stop().

    Attributes:
      failed: set when the run has failed, for the reason in `word`.
      leaving: set by the main thread when it ends the process itself.
      coordinator_is_lost: messages to other processes are no longer possible.
    """

    def __init__(self, client, index: int, count: int, limit: float, relay: Relay | None):
        """`limit`: seconds of silence after which a process counts as dead."""
        self._client, self._index, self._count, self._limit = client, index, count, limit
        self._relay = relay
        self._period = min(max(limit / 5, 0.2), 2)
        self.failed, self.word = threading.Event(), Word("")
        self.leaving = threading.Event()
        self.coordinator_is_lost = False
        self._closing, self._stopped = False, threading.Event()
        self._answered = time.monotonic()  # time of the coordinator's last answer
        self._beats = dict.fromkeys(range(count), ("", self._answered))
        self._lock = threading.Lock()
        loops = self._hear, self._beat, self._measure_silence
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in loops]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Call before jax.distributed.shutdown, after which the coordinator may disconnect."""
        self._closing = True
        if self._relay:
            self._relay.close()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(5)  # a thread inside a JAX call crashes the interpreter at exit
        if self._relay:
            self._relay.stop()

    def tell(self, word: Word) -> None:
        """Announces a failure to the other processes, unless another one was announced first."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(_FAILED, json.dumps(dataclasses.asdict(word)))

    def _hear(self) -> None:
        try:
            value = self._client.blocking_key_value_get(_FAILED, _FOREVER)
        except jax.errors.JaxRuntimeError:
            return  # the run is over, or the coordinator is lost
        self._end(Word(**json.loads(value)))

    def _beat(self) -> None:
        number = 0
        while not self._stopped.wait(self._period):
            number += 1
            try:
                key = f"{_BEAT}/{self._index}"
                self._client.key_value_set(key, str(number), allow_overwrite=True)
                self._answered = time.monotonic()
                if self._index == 0:
                    self._compare(dict(self._client.key_value_dir_get(_BEAT)))
            except jax.errors.JaxRuntimeError:
                continue  # _measure_silence() measures the coordinator's silence

    def _compare(self, beats: dict[str, str]) -> None:
        """Announces a process whose counter has stopped. Runs in process 0."""
        now = time.monotonic()
        for index in range(1, self._count):
            value = beats.get(f"{_BEAT}/{index}", "")
            before, since = self._beats[index]
            if value != before:
                self._beats[index] = value, now
            elif now - since > self._limit:
                self.tell(Word(f"process {index} {self._silent()}"))

    def _silent(self) -> str:
        return (
            f"was silent for {self._limit} s (config.distributed.heartbeat_timeout): it was killed "
            "or hangs, or its host is gone"
        )

    def _measure_silence(self) -> None:
        lost = self._relay.lost if self._relay else threading.Event()  # of process 0: never
        last = time.monotonic()
        while not self._stopped.is_set():
            is_closed = lost.wait(self._period / 2)
            now = time.monotonic()
            if now - last > self._limit / 2:  # this process was suspended
                self._answered = now
                self._beats = {index: (value, now) for index, (value, _) in self._beats.items()}
            last = now
            silent = now - self._answered > self._limit
            if not is_closed and not silent:
                continue
            if self._closing and self._stopped.wait(5):
                return
            self.coordinator_is_lost = True
            why = self._silent() if silent else "ended without a message: it was killed or crashed"
            self._end(Word(f"process 0 {why}"))
            return

    def _end(self, word: Word) -> None:
        """Ends this process, unless the main thread does so within a second."""
        with self._lock:
            if self.failed.is_set():
                return
            self.word = word
            self.failed.set()
        if not self.leaving.wait(1 + LINGER if self._index == 0 else 1):
            say_and_exit(f"process {self._index} lost a peer: {word.text}", 1)


_said = threading.Lock()  # never released: the first thread to take it ends the process


def say(message: str) -> None:
    """Prints one line on stderr, in the first thread that calls it; others block."""
    if _said.acquire(blocking=False):
        print(f"{failures.line_start()}error: {message}", file=sys.stderr, flush=True)
    else:
        threading.Event().wait()  # the other one ends the process


def say_and_exit(message: str, code: int) -> None:
    """Ends the process immediately, without JAX's shutdown barrier."""
    say(message)
    exit_now(code)


def exit_now(code: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
