"""Opens and reads untrusted files within bounds.

A FIFO blocks until a writer opens it, a device such as /dev/zero never ends, deeply nested JSON can
exhaust the stack, and a repeated JSON key can hide a value. Each is refused with one line.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from esolm_jax.errors import UserError

MB = 2**20
JSON_DEPTH = 64
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO (named pipe)",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def expand(path: str | Path) -> Path:
    """`path` with ~ expanded, or unchanged if there is no such user."""
    return Path(os.path.expanduser(path))


def open_regular(path: str | Path, where: str = "") -> BinaryIO:
    """Opens a regular file, or a link to one, for reading.

    Args: where: names the file in errors; `path` by default.

    Raises:
      UserError: no such file, not readable, or a folder, FIFO, device or socket.
    """
    where = where or str(path)
    try:
        _check_regular(os.stat(path).st_mode, where)
        # The path may have been replaced: O_NONBLOCK opens a FIFO without waiting.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _check_regular(os.fstat(descriptor).st_mode, where)
        except BaseException:
            os.close(descriptor)
            raise
        return os.fdopen(descriptor, "rb")
    except FileNotFoundError as error:
        raise UserError(f"{where}: no such file") from error
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise UserError(f"{where!a}: cannot be a file: {error}") from error


def _check_regular(mode: int, where: str) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "not a regular file")
        raise UserError(f"{where}: is {kind}; must be a regular file")


def is_there(path: str | Path) -> bool:
    """Whether the path exists, also as a special file (open_regular refuses those)."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EPERM)
    except ValueError:
        return False
    return True


def read_bytes(path: str | Path, limit: int, where: str = "") -> bytes:
    """The whole file. UserError: see open_regular; or it is larger than `limit` bytes."""
    where = where or str(path)
    with open_regular(path, where) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise UserError(
                f"{where}: has {size / MB:,.0f} MiB; must have at most {limit / MB:,.0f} MiB"
            )
        try:
            return file.read(size)
        except OSError as error:
            raise UserError(f"{where}: cannot be read: {error.strerror}") from error


def read_text(path: str | Path, limit: int, where: str = "") -> str:
    """The whole file, which must be UTF-8. UserError: see read_bytes."""
    content = read_bytes(path, limit, where)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where or path}: is damaged: not UTF-8 at byte {error.start}") from error


def read_json(path: str | Path, limit: int, where: str = "") -> Any:
    """The value of a JSON file. UserError: see read_text and parse_json."""
    return parse_json(read_text(path, limit, where), where or str(path))


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON document.

    Raises:
      UserError: not JSON, an object has a key twice, or nested deeper than JSON_DEPTH.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise UserError(f"{where}: unsupported JSON: nested too deeply") from error
    except (ValueError, MemoryError) as error:
        what = ascii(str(error)[:200])[1:-1]
        raise UserError(f"{where}: not JSON: {what}") from error
    level, depth = [value], 0
    while level := [child for node in level for child in _children(node)]:
        depth += 1
        if depth > JSON_DEPTH:
            raise UserError(f"{where}: unsupported JSON: nested deeper than {JSON_DEPTH} levels")
    return value


def _children(node: Any) -> list:
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [value for value in values if isinstance(value, dict | list)]


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys: set[str] = set()
        repeated = next(key for key, _ in pairs if key in keys or keys.add(key))
        raise ValueError(f"the key {repeated[:80]!r} is repeated")
    return value
