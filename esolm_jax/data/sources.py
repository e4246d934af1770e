"""The documents of a split, one str at a time, from any source.

A new source is one file with a Source and one entry here (or one call of `register`). An
unspecified validation or test split is held out of train by a hash of each document's text, so the
choice is stable, needs no memory, and puts equal documents in the same split.
"""

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

from esolm_jax.data import document_range, shakespeare, text8, text_files, tfds_source
from esolm_jax.data import holdout as holdout_lib
from esolm_jax.data.detokenizers import detokenizer
from esolm_jax.data.source import SPLITS, Source
from esolm_jax.errors import UserError, nearest
from esolm_jax.files.regular_file import open_regular
from esolm_jax.registry import Registry

__all__ = [
    "SPLITS",
    "documents",
    "file_states",
    "get",
    "notes",
    "register",
    "source_hash",
    "splits",
    "unregister",
]

_SOURCES: Registry[Source] = Registry(
    "source",
    {module.SOURCE.name: module.SOURCE for module in (shakespeare, text_files, text8, tfds_source)},
)
register, unregister = _SOURCES.register, _SOURCES.unregister  # names of config.data.source


def allowed() -> str:
    """The allowed values of config.data.source, for messages."""
    *first, last = (source.spelling for source in _SOURCES.values())
    return f"{', '.join(first)} or {last}"


def is_source(value: str) -> bool:
    """Whether config.data.source may have this value."""
    name, _, argument = value.partition(":")
    return name in _SOURCES and bool(argument) == bool(_SOURCES[name].argument)


class SourceCheck:
    """The check of config.data.source, as of config/checks.py; knows sources of `register` too."""

    def accepts(self, value: str) -> bool:
        return is_source(value)

    @property
    def text(self) -> str:
        return allowed()

    def hint(self, value: str) -> str:
        return nearest(value, [source.spelling for source in _SOURCES.values()])


def get(config: Any) -> Source:
    """The source that config.data.source names. UserError: there is none."""
    value = config.data.source
    if not is_source(value):
        hint = SourceCheck().hint(value)
        raise UserError(f"config.data.source={value!r}: must be {allowed()}{hint}")
    return _SOURCES[value.partition(":")[0]]


def splits(config: Any) -> tuple[str, ...]:
    """The splits that can be prepared: all; or those that are given, if train is not."""
    source = get(config)
    given = source.given(config) if source.given else {}
    if not given or given["train"]:
        return SPLITS
    return tuple(split for split in SPLITS if given[split])


def documents(config: Any, split: str) -> Iterator[str]:
    """Yields the documents of `split` ('train', 'validation' or 'test') in order, detokenized.

    Blank ones are left out unless config.data.keep_blank. Raises UserError (while iterating) for
    unreadable input, and for a split without other documents.
    """
    source, clean = get(config), detokenizer(config.data.detokenizer)
    given = source.given(config) if source.given else {}
    has_text = False
    for text in _split_documents(config, source, given, split):
        is_blank = not text.strip()
        has_text |= not is_blank
        if config.data.keep_blank or not is_blank:
            yield clean(text)
    if has_text:
        return
    name = split if given.get(split) else "train"
    held_out = " left after the hold-out" if name == "train" and not all(given.values()) else ""
    raise UserError(
        f"config.data.{name}={given.get(name, '')!r} (config.data.source={config.data.source!r}) "
        f"has no non-empty documents{held_out}"
    )


def source_hash(config: Any) -> str:
    """Hex digest of the content of the source: of its files, or of its identity."""
    source, digest = get(config), hashlib.sha256()
    if source.identity is not None:
        digest.update(source.identity(config))
        return digest.hexdigest()
    for path in source.files(config):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with open_regular(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def file_states(config: Any) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file, to detect changes during the read."""
    states = {str(path): path.stat() for path in get(config).files(config)}
    return {path: (state.st_size, state.st_mtime_ns) for path, state in states.items()}


def notes(config: Any) -> list[str]:
    """Lines on files that are left out and on files that splits share."""
    return get(config).notes(config)


def _split_documents(
    config: Any, source: Source, given: dict[str, str], split: str
) -> Iterator[str]:
    if not given:  # the source has its own splits
        yield from source.documents(config, split, "")
        return
    if given[split] and split != "train":
        yield from _selected(config, source, split, given[split])
        return
    held = tuple(name for name in ("validation", "test") if not given[name])
    if not held:
        yield from _selected(config, source, "train", given["train"])
        return

    def train() -> Iterator[str]:
        read = _selected(config, source, "train", given["train"])
        return (text for text in read if config.data.keep_blank or text.strip())

    field = f"config.data.train={given['train']!r}"
    how = holdout_lib.find(held, config.data.holdout, train, field)
    yield from (text for text in how.documents(train) if how.split_of(text) == split)


def _selected(config: Any, source: Source, split: str, spec: str) -> Iterator[str]:
    """The documents of a spec, which may end in a range."""
    if source.selects_ranges:
        return source.documents(config, split, spec)
    base, chosen = document_range.split_spec(spec, f"config.data.{split}")
    if chosen is None:
        return source.documents(config, split, spec)
    read = functools.partial(source.documents, config, split, base)
    return document_range.select(read, chosen, f"config.data.{split}={spec!r}")
