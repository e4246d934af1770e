"""A relay process between a process and the coordinator.

JAX's client aborts its process, with a stack trace, as soon as its connection closes, for example
because process 0 died. The client therefore connects to a relay. When the coordinator's end closes,
the relay keeps the client's end open and reports it. The relay is a process, not a thread, because
JAX's C++ code waits for the coordinator while it holds the GIL.

This module imports the standard library only, because the relay runs it as a script.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

_PATH_BYTES = 100  # a Unix socket's path may have 107
_LAST_WORD = 10  # seconds for a process to end by itself after the coordinator is lost


class Relay:
    """Starts and controls the relay of this process.

    Attributes:
      target: the address for the client, in place of the coordinator's host:port.
      lost: set if the coordinator closes the connection after joined().
    """

    def __init__(self, address: str, index: int):
        self.lost = threading.Event()
        self._closing = False
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, address, str(index), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # shields it from a terminal's signals
        )
        self.target = self._process.stdout.readline().strip()
        threading.Thread(target=self._listen, daemon=True).start()

    def joined(self) -> None:
        """Call when the process is connected: from now on a closed connection is a loss."""
        self._send("joined")

    def close(self) -> None:
        """Call at the end of the run: the coordinator may close its connection."""
        self._closing = True
        self._send("close")

    def stop(self) -> None:
        self._closing = True
        self._process.kill()
        self._process.wait()

    def _send(self, word: str) -> None:
        try:
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()
        except OSError:  # the relay has ended, and with it the connection
            pass

    def _listen(self) -> None:
        self._process.stdout.readline()  # a line, or end of file
        if not self._closing:
            self.lost.set()


class _Passing:
    """Runs in the relay process: accepts the client's connection and forwards both directions."""

    def __init__(self, address: str):
        host, port = address.rsplit(":", 1)
        self._address = host.strip("[]"), int(port)
        self.lost = threading.Event()
        self._joined = self._closing = False
        self._open: list[socket.socket] = []  # garbage collection would close them
        self._folder = tempfile.mkdtemp(prefix="esolm_jax-")  # private to this user
        if len(os.fsencode(self._folder)) > _PATH_BYTES - 2:
            shutil.rmtree(self._folder)
            self._folder = tempfile.mkdtemp(prefix="esolm_jax-", dir="/tmp")
        path = os.path.join(self._folder, "s")
        self.target = f"unix:{path}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        _start(self._accept)

    def joined(self) -> None:
        self._joined = True
        self.stop_listening()

    def close(self) -> None:
        self._closing = True
        self.stop_listening()

    def stop_listening(self) -> None:
        _shut_down(self._listener)  # accept() returns
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                coordinator = socket.create_connection(self._address, timeout=5)
            except OSError:
                client.close()  # the client tries again
                continue
            coordinator.settimeout(None)
            coordinator.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open += client, coordinator
            _start(self._from_client, client, coordinator)
            _start(self._from_coordinator, client, coordinator)

    def _from_client(self, client: socket.socket, coordinator: socket.socket) -> None:
        _pass_on(client, coordinator)
        _shut_down(coordinator)

    def _from_coordinator(self, client: socket.socket, coordinator: socket.socket) -> None:
        is_open = _pass_on(coordinator, client)
        if not self._joined or self._closing:
            _shut_down(client)
        elif is_open:  # the coordinator closed first
            self.lost.set()


def _start(function, *args) -> None:
    threading.Thread(target=function, args=args, daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> bool:
    """Forwards until the source closes; returns whether the target was still open."""
    while True:
        try:
            data = source.recv(1 << 16)
        except OSError:
            return True
        if not data:
            return True
        try:
            target.sendall(data)
        except OSError:
            return False


def _shut_down(one: socket.socket) -> None:
    try:
        one.shutdown(socket.SHUT_RDWR)
    except OSError:  # already closed
        pass


def _main(address: str, index: str, parent: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with its parent
    passing = _Passing(address)

    def obey():
        for line in sys.stdin:
            {"joined": passing.joined, "close": passing.close}[line.strip()]()

    _start(obey)
    print(passing.target, flush=True)
    lost_at = None
    while os.getppid() == int(parent):
        if lost_at is None and passing.lost.wait(0.3):
            lost_at = time.monotonic()
            with contextlib.suppress(OSError):  # the process has ended
                print("lost", flush=True)
        elif lost_at is not None:
            time.sleep(0.2)
            if time.monotonic() - lost_at > _LAST_WORD and os.getppid() == int(parent):
                words = "lost a peer: process 0 ended without a message: it was killed or crashed"
                print(f"error: process {index} {words}", file=sys.stderr, flush=True)
                os.kill(int(parent), signal.SIGKILL)  # it cannot end itself
    passing.stop_listening()
    os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
