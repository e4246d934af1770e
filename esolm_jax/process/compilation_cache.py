"""The cache of compiled programs that verbs share: ~/.cache/esolm_jax/compiled.

A compiled program is machine code, so the folder belongs to one user, and nobody else may write to
it. JAX's own setting (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE) wins.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import stat
import tempfile

import jax
from jax._src import compilation_cache  # JAX has no public setting for another kind of cache

MAX_BYTES = 2 * 2**30  # unless JAX_COMPILATION_CACHE_MAX_SIZE is set
_MIN_SECONDS = "jax_persistent_cache_min_compile_time_secs"
_SUFFIX = "-program"
_in_use: "ProgramCache | None" = None


class ProgramCache:
    """JAX's CacheInterface on a folder. Never raises: an entry that cannot be read is compiled
    again, one that cannot be written is not kept.

    An entry is its SHA-256 and its value; a damaged one is removed. Entries are written under
    another name first, so processes may share the folder. The least recently used ones go when all
    of them exceed `max_bytes`.

    Attributes:
      last_key: of the entry that was read or written last.
    """

    def __init__(self, folder: pathlib.Path, max_bytes: int):
        self._path = folder
        self.max_bytes = max_bytes
        self.last_key: str | None = None

    def get(self, key: str) -> bytes | None:
        """The value of a key, or None."""
        path = self._path / f"{key}{_SUFFIX}"
        with contextlib.suppress(OSError):
            entry = path.read_bytes()
            digest, value = entry[:32], entry[32:]
            if hashlib.sha256(value).digest() == digest:
                with contextlib.suppress(OSError):
                    os.utime(path)
                self.last_key = key
                return value
            path.unlink()
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keeps a value, unless it alone is too large."""
        if len(value) > self.max_bytes:
            return
        with contextlib.suppress(OSError):
            handle, name = tempfile.mkstemp(dir=self._path)
            try:
                with open(handle, "wb") as file:
                    file.write(hashlib.sha256(value).digest() + value)
                os.replace(name, self._path / f"{key}{_SUFFIX}")
            except OSError:  # no space
                os.unlink(name)
                raise
            self.last_key = key
            self._evict()

    def _evict(self) -> None:
        """Removes the least recently used entries, and what an ended process left half-written."""
        entries = []
        for entry in os.scandir(self._path):
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat()
                if stat.S_ISREG(found.st_mode):  # XLA keeps its choice of GPU kernels in a folder
                    entries.append((found.st_mtime_ns, found.st_size, entry.path))
        excess = sum(size for _, size, _ in entries) - self.max_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            excess -= size


def executable_of(entry: bytes) -> bytes:
    """The serialized executable in an entry that JAX made."""
    return compilation_cache.extract_executable_and_time(
        compilation_cache.decompress_executable(entry)
    )[0]


def is_configured() -> bool:
    """Whether JAX's own settings choose a cache, or none."""
    return not jax.config.jax_enable_compilation_cache or bool(jax.config.jax_compilation_cache_dir)


def open_folder() -> pathlib.Path:
    """The user's folder of this kind of machine; made if needed.

    Raises:
      OSError: it cannot be used; the message says why.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = pathlib.Path(cache) if os.path.isabs(cache) else pathlib.Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError("no home folder") from error
    folder = base / "esolm_jax" / "compiled" / _machine()
    for path in (*reversed(folder.parents[:2]), folder):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
            raise PermissionError(f"{path}: must be writable by its owner alone, you")
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: not writable")
    return folder


def in_use() -> ProgramCache | None:
    """The cache of `use`, if that was called."""
    return _in_use


def use(folder: pathlib.Path) -> None:
    """Keeps programs in this folder for the rest of the process."""
    global _in_use
    limit = jax.config.jax_compilation_cache_max_size
    programs = ProgramCache(folder, MAX_BYTES if limit < 0 else limit)
    _in_use = programs
    compilation_cache.get_file_cache = lambda path: (programs, path)
    if _MIN_SECONDS.upper() not in os.environ:
        jax.config.update(_MIN_SECONDS, 0.0)  # to load a small program is faster, too
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _machine() -> str:
    """Eight hex digits of the CPU's features: code for one CPU may end a process on another, and
    hosts may share a home folder."""
    lines = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if not line.strip():  # the first core is enough
                break
            if line.split("\t")[0] in ("model name", "flags", "Features"):
                lines.append(line)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]
