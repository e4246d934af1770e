"""Ranges of documents: `train[:-100000]`, with the same meaning for every source.

A range selects documents of the split in front of it, in order: counts from the start, counts from
the end if negative, or percentages, rounded to the nearest document. Bounds beyond the ends are the
ends, as in a slice of Python. Blank documents count.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import NoReturn

from esolm_jax.errors import UserError

_BOUND = r"(-?\d+%?)?"
_RANGE = re.compile(rf"(?P<base>.*)\[{_BOUND}:{_BOUND}\]")
# Not well-formed: a glob has no colon in its brackets, and `train` is no glob.
_MALFORMED = re.compile(r".*\[[^\[\]]*:[^\[\]]*\]?|train\[[^\[\]]*\]?")


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

    def indices(self, count: int, where: str) -> range:
        """The selected ones of `count` documents. UserError, beginning with `where`: none is."""
        first, stop = self.bounds(count)
        return range(count)[first:stop] or _raise_empty(where, count)


def is_range(text: str) -> bool:
    """Whether the text is a range with nothing in front of it."""
    found = _RANGE.fullmatch(text)
    return found is not None and not found["base"]


def split_spec(spec: str, field: str) -> tuple[str, DocumentRange | None]:
    """The spec without its range, and the range (None: the spec has none).

    Raises:
      UserError: beginning with `field`, such as config.data.train: a malformed range.
    """
    spec = spec.strip()
    found = _RANGE.fullmatch(spec)
    if found is not None:
        return found["base"], DocumentRange(found[2] or "", found[3] or "")
    if _MALFORMED.fullmatch(spec):
        raise malformed(spec, field)
    return spec, None


def malformed(spec: str, field: str) -> UserError:
    """The error for a range that is none."""
    return UserError(
        f"{field}={spec!r}: must end with a range [FIRST:STOP] of documents, in counts or "
        "percentages, such as [:-1000], [90%:] or [5:10]"
    )


def select(read: Callable[[], Iterator[str]], chosen: DocumentRange, where: str) -> Iterator[str]:
    """The documents of `read()` in the range. A range from the end reads them twice.

    Raises:
      UserError: beginning with `where`: no document is in the range.
    """
    count = sum(1 for _ in read()) if chosen.needs_count else None
    first, stop = chosen.bounds(count or 0)
    if stop is not None and stop <= first:
        _raise_empty(where, count)
    seen = 0
    for text in read():
        if seen == stop:
            return
        if seen >= first:
            yield text
        seen += 1
    if seen <= first:
        _raise_empty(where, seen)


def _raise_empty(where: str, count: int | None) -> NoReturn:
    has = "" if count is None else f", because it has {count:,} documents"
    raise UserError(f"{where}: must be a range with at least one document{has}")


def _position(bound: str, count: int) -> int:
    if bound.endswith("%"):
        value = round(count * int(bound[:-1]) / 100)
    else:
        value = int(bound)
    return max(value + count, 0) if bound.startswith("-") else value
