"""Files of the user, in bounded memory: .txt, .jsonl (plain or compressed), .parquet, .arrow."""

import codecs
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from esolm_jax.data import compressed, document_range, file_list, table_files, text_documents
from esolm_jax.data.source import Source, named_splits
from esolm_jax.errors import UserError

MAX_DOCUMENT = 64 * 1024  # bytes of a piece of a .txt file
MIN_DOCUMENT = 2 * 1024
PIECES = 400  # documents into which a small corpus is cut, so that some can be held out

_OTHER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def documents(config: Any, split: str, spec: str) -> Iterator[str]:
    """The documents of the files that `spec` names: rows of tables, lines of .jsonl, and what
    config.data.document says of .txt."""
    data = config.data
    paths = file_list.find(split, _files_of(config, split, spec)).files
    total = sum(path.stat().st_size for path in paths)
    longest = min(max(total // PIECES, MIN_DOCUMENT), MAX_DOCUMENT)
    for path in paths:
        with compressed.open_file(path) as file:
            if path.suffix.lower() in table_files.SUFFIXES:
                for row, value in enumerate(table_files.texts(path, file, data.text_field)):
                    yield to_text(value, f"{path}, row {row}: column {data.text_field!r}")
                continue
            offset = _skip_mark(path, file)
            if file_list.is_json_lines(path):
                yield from _json_lines(path, file, data.text_field, offset)
            elif data.document == "piece":
                yield from text_documents.pieces(path, file, offset, longest)
            else:
                yield from text_documents.split(path, file, offset, data.document, data.separator)


def _skip_mark(path: Path, file: BinaryIO) -> int:
    """Skips a UTF-8 byte order mark and returns its size. UserError: a mark of UTF-16 or -32."""
    start = file.peek(4)[:4]
    for mark, encoding in _OTHER_MARKS.items():
        if start.startswith(mark):
            raise UserError(f"{path}: is {encoding}: must be UTF-8; convert it (iconv -t UTF-8)")
    return len(file.read(len(codecs.BOM_UTF8))) if start.startswith(codecs.BOM_UTF8) else 0


def _json_lines(path: Path, file: BinaryIO, field: str, offset: int) -> Iterator[str]:
    lines = iter(functools.partial(file.readline, text_documents.MAX_READ + 1), b"")
    for number, line in enumerate(lines, start=1):
        if len(line) > text_documents.MAX_READ:
            raise text_documents.too_long(f"{path}, line {number}", "a document of .jsonl")
        text = text_documents.decode(path, line, offset)
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


def _files_of(config: Any, split: str, spec: str) -> str:
    """The files of a spec without its range; `train` names those of config.data.files."""
    base, chosen = document_range.split_spec(spec, f"config.data.{split}")
    files = config.data.files.strip()
    if base == "train" and chosen is not None and not files:
        raise UserError(
            f"config.data.{split}={spec!r}: names the files of config.data.files, which is ''; set "
            "it"
        )
    return files if base == "train" and files else base


def _given(config: Any) -> dict[str, str]:
    given = named_splits(config)
    if config.data.files.strip():
        given["train"] = given["train"] or "train"
    if not any(given.values()):
        raise UserError(
            "config.data.train='': must name files, because config.data.source is 'text'; for "
            "evaluate, config.data.test or config.data.validation is enough"
        )
    return given


def _file_lists(config: Any) -> dict[str, file_list.FileList]:
    return {
        split: file_list.find(split, _files_of(config, split, spec))
        for split, spec in _given(config).items()
        if spec
    }


def _files(config: Any) -> list[Path]:
    """Each file of several splits once for each: the hash of a source is over this list."""
    return [path for found in _file_lists(config).values() for path in found.files]


def _notes(config: Any) -> list[str]:
    lists, given = _file_lists(config), _given(config)
    left_out = [found.note(f"config.data.{split}") for split, found in lists.items()]
    whole = {
        split: found
        for split, found in lists.items()
        if document_range.split_spec(given[split], f"config.data.{split}")[1] is None
    }
    return [*filter(None, left_out), *file_list.shared(whole)]


SOURCE = Source("text", documents, given=_given, files=_files, notes=_notes)
