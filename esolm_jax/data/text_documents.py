"""What a document is in a .txt file: config.data.document."""

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from esolm_jax.errors import UserError

DOCUMENTS = ("piece", "file", "line", "line_with_newline", "paragraph", "separator")
MAX_READ = 64 * 1024**2  # bytes of a document that is read whole
_BLOCK = 1024**2
_BLANK_LINES = re.compile(rb"\r?\n(?:[ \t]*\r?\n)+")


def decode(path: Path, data: bytes, offset: int) -> str:
    """UTF-8 → text. UserError with the byte: it is something else."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{path}: not UTF-8 at byte {offset + error.start}"
        raise UserError(f"{where}: {error.reason}") from error


def too_long(where: str, what: str) -> UserError:
    """The error for a document that exceeds MAX_READ."""
    return UserError(
        f"{where}: must be at most {MAX_READ:,} bytes, because {what} is read whole; split it, or "
        "store it as .txt with config.data.document=piece"
    )


def pieces(path: Path, file: BinaryIO, offset: int, longest: int) -> Iterator[str]:
    """The file in pieces of at most `longest` bytes, which end at line ends if possible."""
    data = b""
    while True:
        data += file.read(longest + 1 - len(data))
        if len(data) <= longest:  # the end of the file
            yield decode(path, data, offset)
            return
        cut = data.rfind(b"\n", 0, longest) + 1
        if not cut:  # a line longer than a document: cut before the start of a character
            cut = longest
            while cut > longest - 3 and data[cut] & 0xC0 == 0x80:
                cut -= 1
        yield decode(path, data[:cut], offset)
        offset, data = offset + cut, data[cut:]


def split(
    path: Path, file: BinaryIO, offset: int, document: str, separator: str = ""
) -> Iterator[str]:
    """The documents of a file that starts at byte `offset`; `document` is not "piece".

    A blank line is an empty document of `line` and `line_with_newline`. A paragraph ends at blank
    lines.

    Raises:
      UserError: a document is longer than MAX_READ, or not UTF-8.
    """
    read: Callable[..., Iterator[tuple[bytes, int]]] = {
        "file": _whole,
        "line": _lines,
        "line_with_newline": functools.partial(_lines, keep_newline=True),
        "paragraph": _paragraphs,
        "separator": functools.partial(_between, end=re.compile(re.escape(separator.encode()))),
    }[document]
    for data, start in read(path, file):
        yield decode(path, data, offset + start)


def _whole(path: Path, file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    data = file.read(MAX_READ + 1)
    if len(data) > MAX_READ:
        raise too_long(str(path), "a file of config.data.document=file")
    yield data, 0


def _lines(
    path: Path, file: BinaryIO, *, keep_newline: bool = False
) -> Iterator[tuple[bytes, int]]:
    start = 0
    for line in iter(functools.partial(file.readline, MAX_READ + 1), b""):
        if len(line) > MAX_READ:
            raise too_long(f"{path}, byte {start}", "a line")
        if not line.strip():
            yield b"", start
        else:
            yield line if keep_newline else line.rstrip(b"\r\n"), start
        start += len(line)


def _paragraphs(path: Path, file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    for data, start in _between(path, file, end=_BLANK_LINES):
        yield data.rstrip(b"\r\n"), start


def _between(path: Path, file: BinaryIO, *, end: re.Pattern[bytes]) -> Iterator[tuple[bytes, int]]:
    """The parts between the matches of `end`; no empty part after the last one."""
    data, start, block = b"", 0, b" "
    while block:
        block, begin = file.read(_BLOCK), 0
        data += block
        complete = len(data.rstrip()) if block else len(data) + 1
        for found in end.finditer(data):
            if found.end() >= complete:
                break  # it may go on in the next block
            yield data[begin : found.start()], start + begin
            begin = found.end()
        start, data = start + begin, data[begin:]
        if len(data) > MAX_READ:
            raise too_long(f"{path}, byte {start}", "a document")
    if data:
        yield data, start
