"""Own text: .txt and .jsonl files, plain or gzipped, in bounded memory."""

import contextlib
import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from esolm_jax.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
MAX_DOCUMENT = 64 * 1024  # bytes; longer .txt files are cut into documents of at most this
MIN_DOCUMENT = 2 * 1024
PIECES = 400  # a small corpus is cut finer, into about so many, so that some can be held out


def find(split: str, spec: str) -> list[Path]:
    """Sorted files of a comma-separated list of files, directories and globs.

    Raises UserError naming config.data.<split> for whatever is missing, empty or not text.
    """
    found: set[Path] = set()
    field = f"config.data.{split}={spec!r}"
    for part in filter(None, (p.strip() for p in spec.split(","))):
        part = os.path.abspath(os.path.expanduser(part))
        if os.path.isfile(part):
            if not part.endswith(SUFFIXES):
                raise UserError(f"{field}: {part} does not end with any of {', '.join(SUFFIXES)}")
            matches = [part]
        elif os.path.isdir(part):
            matches = [part]
        elif glob.has_magic(part):
            matches = glob.glob(part, recursive=True)
        else:
            raise UserError(f"{field}: no such file or directory: {part}")
        inside = [os.path.join(d, f) for m in matches for d, _, files in os.walk(m) for f in files]
        files = [f for f in matches + inside if f.endswith(SUFFIXES) and os.path.isfile(f)]
        if not files:
            raise UserError(f"{field}: {part} holds no files ending with {', '.join(SUFFIXES)}")
        found.update(map(Path, files))
    if not found:
        raise UserError(f"{field}: names no files")
    return sorted(found)


def documents(config: Any, split: str, spec: str) -> Iterator[str]:
    """The documents of the files that `spec` names: a line of .jsonl, or a .txt file, cut at line
    ends where it is too long to be held out, or held in memory, as one."""
    paths = find(split, spec)
    total = sum(path.stat().st_size for path in paths)
    longest = min(max(total // PIECES, MIN_DOCUMENT), MAX_DOCUMENT)
    for path in paths:
        with _open(path) as file:
            if path.name.endswith((".jsonl", ".jsonl.gz")):
                yield from _json_lines(path, file, config.data.text_field)
            else:
                yield from _pieces(path, file, longest)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _decode(path: Path, data: bytes, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{path}: not UTF-8 at byte {offset + error.start}"
        raise UserError(f"{where}: {error.reason}") from error


def _pieces(path: Path, file: BinaryIO, longest: int) -> Iterator[str]:
    offset, data = 0, b""
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


def _json_lines(path: Path, file: BinaryIO, field: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(file, start=1):
        text = _decode(path, line, offset)
        offset, where = offset + len(line), f"{path}, line {number}"
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: bad JSON: {error}") from error
        if not isinstance(record, dict) or field not in record:
            fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise UserError(f"{where}: no field config.data.text_field={field!r}; has: {fields}")
        yield to_text(record[field], f"{where}: field {field!r}")


def to_text(value: Any, where: str) -> str:
    """A field's value as str. UserError, beginning with `where`, if it is no valid text."""
    try:
        if isinstance(value, str):
            value.encode("utf-8")  # JSON can spell half a surrogate pair, which is no character
            return value
        if isinstance(value, bytes):
            return value.decode("utf-8")
    except UnicodeError as error:
        raise UserError(f"{where}: not valid Unicode: {error}") from error
    raise UserError(f"{where}: text is wanted, got {type(value).__name__}")
