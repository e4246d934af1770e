"""Digests of the files of a checkpoint: written when a step is committed, compared on restore.

A step holds `_DIGESTS`, a JSON file with the size and the XXH3-128 of every file of its items, and
the SHA-256 of this list, which identifies the step. It is written in the temporary folder, before
Orbax renames the step to its final name: a finished step always has one. Steps written before
XXH3-128 was used have the SHA-256 of every file, and are verified with it. Steps of commit 947f88e
and earlier have no digests and cannot be verified.

In many processes each one hashes the files that it wrote (`write_part`), and process 0 the rest. On
restore the processes share the files (`problem`).
"""

import concurrent.futures
import errno
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable

from esolm_jax.errors import UserError
from esolm_jax.files import regular_file
from esolm_jax.files.hashing import ALGORITHMS, hash_file

FILE = "_DIGESTS"
ALGORITHM = "xxh3_128"  # algorithm of new steps
_ORBAX_FILE = "_CHECKPOINT_METADATA"  # Orbax rewrites it after the digests
_MAX_BYTES = 2**30  # largest allowed digest file of a step
# The file may be intact: this process, or the connection to the disk, is out of a resource.
_TRANSIENT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT)
_SMALL = 2**16  # bytes; every process verifies files up to this size itself
_THREADS = min(8, os.cpu_count() or 1)
_TMP = re.compile(r"\.orbax-checkpoint-tmp[^/]*")  # of a step or an item that is being written


class Damaged(Exception):
    """A file is damaged. The message names the file and the reason."""


def _hash_files(folder: pathlib.Path, names: Iterable[str]) -> dict[str, list]:
    names = sorted(names)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        hashed = pool.map(lambda name: list(hash_file(folder / name, ALGORITHM)), names)
        return {_TMP.sub("", name): entry for name, entry in zip(names, hashed, strict=True)}


def _files(folder: pathlib.Path) -> set[str]:
    """Files of all items, relative to the folder of the step."""
    inner = (path for path in folder.glob("*/**/*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in inner}


def _summary(files: dict) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _part(folder: pathlib.Path, process: int) -> pathlib.Path:
    return folder / f"{FILE}.process_{process}"


def write_part(folder: pathlib.Path, process: int) -> None:
    """Hashes the array files that this process has written in the folder of an unfinished step."""
    own = [name for name in _files(folder) if f"/ocdbt.process_{process}/" in name]
    _part(folder, process).write_text(json.dumps(_hash_files(folder, own)))


def write(folder: pathlib.Path) -> None:
    """Writes the digests of all files in the folder of a step, before the step becomes final."""
    files: dict[str, list] = {}
    for part in folder.glob(f"{FILE}.process_*"):
        files |= json.loads(part.read_text())
        part.unlink()
    rest = [name for name in _files(folder) if _TMP.sub("", name) not in files]
    files |= _hash_files(folder, rest)
    entry = {"algorithm": ALGORITHM, "files": files, "digest": _summary(files)}
    with open(folder / FILE, "w") as file:
        json.dump(entry, file)
        file.flush()
        os.fsync(file.fileno())


def read(folder: pathlib.Path) -> dict | None:
    """The entry of `_DIGESTS`, or None in a step that was written without digests.

    Raises:
      Damaged: it cannot be read, or it is missing although the step was written with digests.
      UserError: the step was written with an unsupported algorithm.
    """
    path = folder / FILE
    written_with = _written_with(folder)
    if not path.exists() and not path.is_symlink():
        if written_with:
            raise Damaged(f"{path}: is missing")
        return None
    try:
        entry = json.loads(regular_file.read_bytes(path, _MAX_BYTES))
        algorithm = str(entry["algorithm"])
        right = entry["digest"] == _summary(entry["files"])
    except UserError as error:
        raise Damaged(str(error)) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{path}: cannot be read ({_short(error)})") from error
    if not right:
        raise Damaged(f"{path}: differs from its own digest")
    if algorithm != (written_with or algorithm):
        raise Damaged(f"{path}: algorithm={algorithm[:40]!r}: differs from {_ORBAX_FILE}")
    if algorithm not in ALGORITHMS:
        raise UserError(
            f"{path}: algorithm={algorithm[:40]!r}: must be one of {', '.join(ALGORITHMS)}; "
            "a newer version of esolm_jax may have written this step"
        )
    return entry


def _written_with(folder: pathlib.Path) -> str | None:
    """The digest algorithm recorded in Orbax's metadata file."""
    path = folder / _ORBAX_FILE
    if not regular_file.is_there(path):
        raise Damaged(f"{path}: is missing, so this is not a checkpoint of esolm_jax")
    try:
        content = json.loads(regular_file.read_bytes(path, _MAX_BYTES))
        return (content.get("custom_metadata") or {}).get("digests")
    except UserError as error:
        raise Damaged(str(error)) from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path}: cannot be read ({_short(error)})") from error


def problem(
    folder: pathlib.Path, items: Iterable[str], *, process: int = 0, processes: int = 1
) -> str | None:
    """A line that names a damaged file of these items, or None.

    Each of several processes hashes its share of the large files; together they cover all files.
    """
    entry = read(folder)
    if entry is None:
        missing = [folder / item for item in items if not (folder / item).is_dir()]
        return f"{missing[0]}: is missing" if missing else None
    files, algorithm = entry["files"], entry["algorithm"]
    for item in items:
        if not any(name.startswith(f"{item}/") for name in files):
            return f"{folder / item}: is missing"
    names = [name for name in sorted(files) if name.split("/")[0] in items]
    large = [name for name in names if files[name][0] > _SMALL]
    mine = set(large[process::processes]) | (set(names) - set(large))
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        lines = pool.map(
            lambda name: _file_problem(folder / name, algorithm, *files[name]), sorted(mine)
        )
        return next((line for line in lines if line), None)


def _file_problem(path: pathlib.Path, algorithm: str, size: int, digest: str) -> str | None:
    try:
        if not path.exists():
            return f"{path}: is missing"
        if not path.is_file():
            return f"{path}: is not a file"
        if (now := path.stat().st_size) != size:
            return f"{path}: has {now:,} bytes, not {size:,}"
        if hash_file(path, algorithm) != (size, digest):
            return f"{path}: content differs from its recorded digest"
    except OSError as error:
        if error.errno in _TRANSIENT:
            raise UserError(f"{path}: cannot be read now ({_short(error)}); try again") from error
        return f"{path}: cannot be read ({_short(error)})"
    return None


def _short(error: BaseException) -> str:
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return f"{type(error).__name__}: {text[:120]}"
