"""Text files of the user: .txt and .jsonl, plain or gzipped, in bounded memory."""

import codecs
import contextlib
import functools
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from esolm_jax.data import file_list
from esolm_jax.data.source import Source, named_splits
from esolm_jax.errors import UserError
from esolm_jax.files.regular_file import open_regular

MAX_DOCUMENT = 64 * 1024  # bytes; longer .txt files are cut into documents of at most this
MIN_DOCUMENT = 2 * 1024
PIECES = 400  # documents into which a small corpus is cut, so that some can be held out
MAX_LINE = 64 * 1024**2  # bytes of a line of .jsonl
BOMB_BYTES, BOMB_RATIO = 16 * 1024**2, 200  # a .gz file beyond both is refused

_OTHER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def documents(config: Any, split: str, spec: str) -> Iterator[str]:
    """The documents of the files that `spec` names: lines of .jsonl, or .txt files. Long
    .txt files are cut at line ends."""
    paths = file_list.find(split, spec).files
    total = sum(path.stat().st_size for path in paths)
    longest = min(max(total // PIECES, MIN_DOCUMENT), MAX_DOCUMENT)
    for path in paths:
        with _open(path) as (file, offset):
            if path.name.lower().endswith((".jsonl", ".jsonl.gz")):
                yield from _json_lines(path, file, config.data.text_field, offset)
            else:
                yield from _pieces(path, file, longest, offset)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """(the file after its byte order mark, the size of the mark)."""
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open_regular(path))
            if path.suffix.lower() == ".gz":
                unzipped = stack.enter_context(gzip.open(file, "rb"))
                file = stack.enter_context(io.BufferedReader(_Unzipped(path, file, unzipped)))
            yield file, _skip_mark(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


class _Unzipped(io.RawIOBase):
    """The content of a .gz file. UserError for a gzip bomb."""

    def __init__(self, path: Path, zipped: BinaryIO, unzipped: BinaryIO):
        self._path, self._zipped, self._unzipped, self._size = path, zipped, unzipped, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._unzipped.read1(len(buffer))
        buffer[: len(data)] = data
        self._size += len(data)
        if self._size > BOMB_BYTES and self._size > BOMB_RATIO * self._zipped.tell():
            raise UserError(
                f"{self._path}: a gzip bomb: its first {self._zipped.tell():,} bytes unzip to "
                f"more than {BOMB_RATIO} times as many; if the text is real, unzip the file first"
            )
        return len(data)


def _skip_mark(path: Path, file: BinaryIO) -> int:
    """Skips a UTF-8 byte order mark and returns its size. UserError: a mark of UTF-16 or -32."""
    start = file.peek(4)[:4]
    for mark, encoding in _OTHER_MARKS.items():
        if start.startswith(mark):
            raise UserError(f"{path}: is {encoding}: must be UTF-8; convert it (iconv -t UTF-8)")
    return len(file.read(len(codecs.BOM_UTF8))) if start.startswith(codecs.BOM_UTF8) else 0


def _decode(path: Path, data: bytes, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{path}: not UTF-8 at byte {offset + error.start}"
        raise UserError(f"{where}: {error.reason}") from error


def _pieces(path: Path, file: BinaryIO, longest: int, offset: int) -> Iterator[str]:
    data = b""
    while True:
        data += file.read(longest + 1 - len(data))
        if len(data) <= longest:  # the end of the file
            yield _decode(path, data, offset)
            return
        cut = data.rfind(b"\n", 0, longest) + 1
        if not cut:  # a line longer than a document: cut before the start of a character
            cut = longest
            while cut > longest - 3 and data[cut] & 0xC0 == 0x80:
                cut -= 1
        yield _decode(path, data[:cut], offset)
        offset, data = offset + cut, data[cut:]


def _json_lines(path: Path, file: BinaryIO, field: str, offset: int) -> Iterator[str]:
    lines = iter(functools.partial(file.readline, MAX_LINE + 1), b"")
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_LINE:
            raise UserError(
                f"{path}, line {number}: must be at most {MAX_LINE:,} bytes, because a document "
                "of .jsonl is read whole; split it, or store it as .txt"
            )
        text = _decode(path, line, offset)
        offset, where = offset + len(line), f"{path}, line {number}"
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: bad JSON: {error}") from error
        if not isinstance(record, dict) or field not in record:
            raise UserError(
                f"{where}: no field config.data.text_field={field!r}; has: {_fields(record)}"
            )
        yield to_text(record[field], f"{where}: field {field!r}")


def _fields(record: Any) -> str:
    """The names of a record's first fields."""
    if not isinstance(record, dict):
        return type(record).__name__
    names = [ascii(name)[1:-1][:40] for name in itertools.islice(record, 20)]
    return ", ".join(names) + (", …" if len(record) > 20 else "")


def to_text(value: Any, where: str) -> str:
    """A field's value as str. UserError, beginning with `where`, if it is no valid text."""
    try:
        if isinstance(value, str):
            value.encode("utf-8")  # JSON can hold a lone surrogate, which is no character
            return value
        if isinstance(value, bytes):
            return value.decode("utf-8")
    except UnicodeError as error:
        raise UserError(f"{where}: not valid Unicode: {error}") from error
    raise UserError(f"{where}: must be text, not {type(value).__name__}")


def _given(config: Any) -> dict[str, str]:
    given = named_splits(config)
    if not given["train"]:
        raise UserError(
            "config.data.train='': must name files, because config.data.source is 'text'"
        )
    return given


def _file_lists(config: Any) -> dict[str, file_list.FileList]:
    return {split: file_list.find(split, spec) for split, spec in _given(config).items() if spec}


def _files(config: Any) -> list[Path]:
    return [path for found in _file_lists(config).values() for path in found.files]


def _notes(config: Any) -> list[str]:
    lists = _file_lists(config)
    left_out = [found.note(f"config.data.{split}") for split, found in lists.items()]
    return [*filter(None, left_out), *file_list.shared(lists)]


SOURCE = Source("text", documents, given=_given, files=_files, notes=_notes)
