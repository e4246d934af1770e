"""Ranges of documents: `train[:-100000]`, as in TFDS, for every source.

A range selects documents of the split in front of it, in order: counts from the start, counts from
the end if negative, or percentages. Blank documents count.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator

from esolm_jax.errors import UserError

_BOUND = r"(-?\d+%?)?"
_RANGE = re.compile(rf"(?P<base>.*)\[{_BOUND}:{_BOUND}\]")


@dataclasses.dataclass(frozen=True)
class DocumentRange:
    """Documents [start, stop) of a split, as in the text of a range; "" = the end of the split."""

    start: str = ""
    stop: str = ""

    @property
    def needs_count(self) -> bool:
        return any("-" in bound or "%" in bound for bound in (self.start, self.stop))

    def bounds(self, count: int) -> tuple[int, int | None]:
        """(first, stop) of a split with `count` documents; stop None: no end."""
        first = _position(self.start, count) if self.start else 0
        return first, _position(self.stop, count) if self.stop else None


def split_spec(spec: str) -> tuple[str, DocumentRange | None]:
    """The spec without its range, and the range (None: the spec has none)."""
    found = _RANGE.fullmatch(spec.strip())
    if found is None:
        return spec, None
    return found["base"], DocumentRange(found[2] or "", found[3] or "")


def select(read: Callable[[], Iterator[str]], chosen: DocumentRange, spec: str) -> Iterator[str]:
    """The documents of `read()` in the range. A range from the end reads them twice.

    Raises:
      UserError: the range is empty, or reaches beyond the documents.
    """
    count = sum(1 for _ in read()) if chosen.needs_count else 0
    first, stop = chosen.bounds(count)
    if stop is not None and stop <= first:
        has = f", because it has {count:,} documents" if count else ""
        raise UserError(f"{spec!r}: must be a range with at least one document{has}")
    yield from itertools.islice(read(), first, stop)


def _position(bound: str, count: int) -> int:
    if bound.endswith("%"):
        value = round(count * int(bound[:-1]) / 100)
    else:
        value = int(bound)
    return max(value + count, 0) if bound.startswith("-") else value
