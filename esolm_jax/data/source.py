"""Source: one kind of text, as `prepare` reads it. The registry is in sources.py."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SPLITS = ("train", "validation", "test")


def _none(config: Any) -> list:
    del config
    return []


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of documents.

    Attributes:
      name: the value of config.data.source is NAME, or NAME:ARGUMENT if `argument` is not "".
      documents: (config, split, spec) → the documents of the spec of a split, one str at a time.
        Raises UserError while iterating.
      given: config → the spec of each split ("" = held out of train). None: the source
        has its own three splits, and config.data.train etc. are not read.
      argument: such as "<name>", for messages.
      files: config → the files that hold the text, in order.
      identity: config → bytes that change with the text; default: hashes of `files`.
      selects_ranges: whether `documents` reads ranges in specs (train[:-100]) itself, because it
        has random access; else it gets specs without them, and the range is applied to what it
        yields. All use document_range, so a range has one meaning.
      notes: config → lines for the user, such as on files that are left out.
    """

    name: str
    documents: Callable[[Any, str, str], Iterator[str]]
    given: Callable[[Any], dict[str, str]] | None = None
    argument: str = ""
    files: Callable[[Any], list[Path]] = _none
    identity: Callable[[Any], bytes] | None = None
    selects_ranges: bool = False
    notes: Callable[[Any], list[str]] = _none

    @property
    def spelling(self) -> str:
        """Its value of config.data.source."""
        return f"{self.name}:{self.argument}" if self.argument else self.name


def named_splits(config: Any) -> dict[str, str]:
    """config.data.train, .validation and .test."""
    return {split: config.data[split].strip() for split in SPLITS}
