"""text8: the characters of config.data.train, a text8.zip or the file in it.

The first 90 % are train, the next 5 % validation, the rest test: 90, 5 and 5 million of the
100 million characters. Each document is config.data.seq_len characters; a last short one is left
out with config.data.window_mode=published.
"""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from esolm_jax.data.source import SPLITS, Source
from esolm_jax.errors import UserError, brief
from esolm_jax.files import regular_file

CHARACTERS = 100_000_000
_ALPHABET = frozenset(b"abcdefghijklmnopqrstuvwxyz ")
_BLOCK = 1024**2  # characters that are read at a time


def _path(config: Any) -> Path:
    spec = config.data.train.strip()
    if not spec:
        raise UserError(
            "config.data.train='': must name text8.zip or the file text8 in it "
            "(http://mattmahoney.net/dc/text8.zip), because config.data.source is 'text8'"
        )
    path = regular_file.expand(spec)
    if not regular_file.is_there(path):
        raise UserError(f"config.data.train={spec!r}: no such file")
    return path


def _open(path: Path) -> tuple[BinaryIO, int]:
    """(the characters, how many). UserError: damaged."""
    if not zipfile.is_zipfile(path):
        return regular_file.open_regular(path), path.stat().st_size
    try:
        archive = zipfile.ZipFile(path)
        (member,) = archive.infolist()
        return io.BufferedReader(archive.open(member)), member.file_size
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise UserError(f"{path}: must be a zip with one file, text8: {brief(error)}") from error


def documents(config: Any, split: str, spec: str) -> Iterator[str]:
    """The documents of a split."""
    del spec
    path, length = _path(config), config.data.seq_len
    file, count = _open(path)
    ends = [0, count * 90 // 100, count * 95 // 100, count]
    start, stop = ends[SPLITS.index(split)], ends[SPLITS.index(split) + 1]
    block = max(_BLOCK // length, 1) * length
    with file:
        _skip(path, file, start)
        for begin in range(start, stop, block):
            data = _read(path, file, min(block, stop - begin))
            for i in range(0, len(data), length):
                document = data[i : i + length]
                if len(document) == length or config.data.window_mode == "all":
                    yield document.decode("ascii")


def _skip(path: Path, file: BinaryIO, count: int) -> None:
    while count:
        count -= len(_read(path, file, min(count, _BLOCK)))


def _read(path: Path, file: BinaryIO, size: int) -> bytes:
    """The next `size` characters. UserError: there are fewer, or others than those of text8."""
    try:
        data = file.read(size)
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read: {brief(error)}") from error
    if len(data) < size:
        raise UserError(f"{path}: ends too early; get it again")
    if others := set(data) - _ALPHABET:
        raise UserError(
            f"{path}: has the byte {bytes([min(others)])!r}: text8 has only a to z and spaces"
        )
    return data


def _files(config: Any) -> list[Path]:
    return [_path(config)]


def _notes(config: Any) -> list[str]:
    file, count = _open(_path(config))
    file.close()
    note = f"{_path(config)}: has {count:,} characters; text8 has {CHARACTERS:,}"
    return [note] if count != CHARACTERS else []


SOURCE = Source("text8", documents, files=_files, notes=_notes)
