"""Opens files that may be compressed: .gz and .zst. A file that explodes is refused."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from esolm_jax.errors import UserError
from esolm_jax.files.regular_file import open_regular

SUFFIXES = (".gz", ".zst")
BOMB_BYTES, BOMB_RATIO = 16 * 1024**2, 200  # a compressed file beyond both is refused


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """The content of a file. UserError: it cannot be read or unpacked."""
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open_regular(path))
            suffix = path.suffix.lower()
            if suffix in SUFFIXES:
                read = _zstd(file) if suffix == ".zst" else gzip.open(file, "rb").read1
                file = stack.enter_context(io.BufferedReader(_Unpacked(path, file, read)))
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _zstd(file: BinaryIO) -> Callable[[int], bytes]:
    import pyarrow as pa  # slow, and only these files need it

    return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd").read


class _Unpacked(io.RawIOBase):
    """The content of a compressed file, by read(size). UserError: it explodes."""

    def __init__(self, path: Path, packed: BinaryIO, read: Callable[[int], bytes]):
        self._path, self._packed, self._read, self._size = path, packed, read, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        self._size += len(data)
        if self._size > BOMB_BYTES and self._size > BOMB_RATIO * self._packed.tell():
            kind = "gzip" if self._path.suffix.lower() == ".gz" else "zstd"
            raise UserError(
                f"{self._path}: a {kind} bomb: its first {self._packed.tell():,} bytes unpack to "
                f"more than {BOMB_RATIO} times as many; if the text is real, unpack the file first"
            )
        return len(data)
