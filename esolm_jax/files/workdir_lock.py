"""One writer at a time in a folder: a file lock and a lease.

The lock (NAME) is a POSIX file lock. The kernel releases it at any end of its process, and child
processes do not inherit it. On local disks, NFS, Lustre and similar file systems the lock is
visible on all hosts. Buckets mounted by FUSE and some other file systems lock within one host or
not at all.

The lease (NAME.json) names the holder: host, process, start time, command. The holder rewrites it
every few seconds. Where locks are not visible on other hosts, a lease of another host is valid
while it changes, and stale if it is unchanged for STALE seconds. Clocks of hosts are never
compared.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterator

from esolm_jax.errors import UserError
from esolm_jax.files.lease import Lease
from esolm_jax.files.shared_locks import locks_are_shared

FILE = ".lock"  # in a workdir
REFRESH = 10.0  # seconds between two versions of a lease
STALE = 90.0  # seconds; some mounts cache files for up to a minute
SETTLE = 3.0  # seconds until a lease written at the same time is visible
PATIENCE = 1.0  # seconds to retry a lock that another process holds
DYING = 10.0  # seconds that the kernel may take to close the files of a killed process

_held: set[pathlib.Path] = set()  # by this process: POSIX locks do not exclude their own process
_guard = threading.Lock()


class Lock:
    """Made by hold(). check() raises UserError once another process has taken the folder."""

    def __init__(self, path: pathlib.Path, name: str):
        self.path, self._name = path, name
        self.lease = Lease.of_this_process()
        self._lease_path = path.with_name(path.name + ".json")
        self._handle: int | None = None  # of the locked file
        self._lost = ""
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def check(self) -> None:
        if self._lost:
            raise UserError(f"{self._name}: {self._lost}; this run ends without further writes")

    def acquire(self) -> None:
        """Raises UserError if another process holds it, OSError if the folder is not writable."""
        try:
            self._acquire()
            self._write()
            if not (self._handle is not None and locks_are_shared(self.path)):
                self._released.wait(SETTLE)
                other = self._read()
                if other is not None and other.token != self.lease.token:
                    raise self._is_held(other)
        except BaseException:
            self._close()
            raise
        self._thread.start()

    def release(self) -> None:
        if self.lease.pid != os.getpid():  # a forked child
            return
        self._released.set()
        self._thread.join(REFRESH)
        with contextlib.suppress(OSError):
            found = self._read()
            if found is not None and found.token == self.lease.token:
                self._lease_path.unlink(missing_ok=True)
            if self._is_ours():
                self.path.unlink()
        self._close()

    def _acquire(self) -> None:
        begin = time.monotonic()
        while True:
            is_free = self._try_lock()
            lease = self._read()
            waited = time.monotonic() - begin
            if is_free is False:
                # Its holder may be dying, or may not have written its lease yet.
                is_dying = lease is not None and lease.is_here() and not lease.is_alive()
                if waited > (DYING if is_dying else PATIENCE):
                    raise self._is_held(lease)
                time.sleep(0.05)
                continue
            if lease is None:
                return
            if lease.is_here():
                if lease.is_alive():
                    raise self._is_held(lease)
            elif not (is_free and locks_are_shared(self.path)) and self._changes(lease):
                raise self._is_held(lease)
            print(f"{self._name}: taken over from a run that died ({lease})", flush=True)
            return

    def _try_lock(self) -> bool | None:
        """Whether this process now has the lock; None if the file system has no locks."""
        self._close()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        handle = os.open(self.path, flags, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                return None
            raise
        self._handle = handle
        if not self._is_ours():  # the last holder deleted it
            return self._try_lock()
        return True

    def _is_ours(self) -> bool:
        """Whether the locked file still has this name."""
        if self._handle is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._handle), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _changes(self, lease: Lease) -> bool:
        """Whether another host still refreshes its lease; False if the lease is deleted."""
        print(
            f"{self._name}: in use by {lease}; waiting up to {STALE:.0f} s to see whether that run "
            "is still alive",
            flush=True,
        )
        end = time.monotonic() + STALE
        while time.monotonic() < end:
            time.sleep(min(1.0, STALE / 10))
            now = self._read()
            if now is None:
                return False
            if now != lease:
                return True
        return False

    def _is_held(self, lease: Lease | None) -> UserError:
        holder = lease or "unknown process: no lease"
        return UserError(
            f"{self._name}: another run is writing here ({holder}); wait until it ends, end it, "
            "or choose another folder"
        )

    def _read(self) -> Lease | None:
        for _ in range(3):
            try:
                value = json.loads(self._lease_path.read_text(encoding="utf-8"))
                return Lease(**value)
            except FileNotFoundError:
                return None
            except (ValueError, TypeError, OSError):  # half-written where renaming is not atomic
                time.sleep(0.05)
        return None

    def _write(self) -> None:
        draft = self._lease_path.with_name(f"{self._lease_path.name}.{self.lease.token[:8]}")
        try:
            draft.write_text(json.dumps(dataclasses.asdict(self.lease)) + "\n", encoding="utf-8")
            os.replace(draft, self._lease_path)
        finally:
            draft.unlink(missing_ok=True)

    def _keep(self) -> None:
        """Refreshes the lease and detects a lost lock; runs in a thread."""
        while not self._released.wait(REFRESH):
            try:
                self._lost = self._lost or self._refresh()
            except OSError:  # a full disk or a network failure does not lose the lock
                continue

    def _refresh(self) -> str:
        """Writes the next version; returns the reason if the lock is lost, else ""."""
        found = self._read()
        if found is not None and found.token != self.lease.token:
            return f"taken over by another run ({found})"
        if self._handle is not None and not self._is_ours() and not self._try_lock():
            return f"{self.path.name} was deleted, and another run has locked it since"
        self.lease = dataclasses.replace(self.lease, beat=self.lease.beat + 1)
        self._write()
        return ""

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)  # and unlocks
            self._handle = None


@contextlib.contextmanager
def hold(folder: pathlib.Path, *, name: str, file: str = FILE) -> Iterator[Lock]:
    """Locks `folder` for this process; creates it if it does not exist.

    Args:
      name: name of the folder in messages, such as "--workdir=runs/a".
      file: name of the lock file in it.

    Raises:
      UserError: another process, which the message names, holds the lock; or there is a file in
        place of the folder.
      OSError: the folder cannot be created or written.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"{name}: {folder} cannot be a folder: {error.strerror}") from error
    path = folder.resolve() / file
    lock = Lock(path, name)
    with _guard:
        if path in _held:
            raise UserError(f"{name}: this process itself is writing here already")
        _held.add(path)
    try:
        lock.acquire()
        try:
            yield lock
        finally:
            lock.release()
    finally:
        _held.discard(path)
        if is_new:
            with contextlib.suppress(OSError):  # something was written
                folder.rmdir()


def is_file_of_lock(name: str, file: str = FILE) -> bool:
    """Whether a file of this name belongs to a lock; drafts of a killed writer do, too."""
    return name == file or name.startswith(f"{file}.json")
