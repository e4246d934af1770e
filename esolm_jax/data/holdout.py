"""Holds unspecified splits out of train, by a hash of each document's text. So the choice is
stable, needs no memory, and puts equal documents in the same split.

In a small corpus the hashes may leave a split without documents. Only then, the documents with the
nearest hashes move to it; a corpus of few documents is first cut into parts.
"""

import dataclasses
import hashlib
import heapq
import itertools
import re
from collections.abc import Callable, Iterator

from esolm_jax.errors import UserError

MANY, MAX_PARTS = 10, 32  # total parts, for fewer than MANY documents
SHORT = 16  # average characters of a part; shorter parts are tried last
FEW = 4096  # smallest hashes kept: enough to fill an empty split
_SPACE = re.compile(r"\s")
Read = Callable[[], Iterator[str]]  # the non-blank documents of train


@dataclasses.dataclass(frozen=True)
class Holdout:
    """Which documents of train belong to which split.

    Attributes:
      held: the held-out splits, of "validation" and "test".
      bounds: for each of them the hashes [low, high) of its documents, in [0, 1).
      parts: how many parts each document is cut into; 1 = none.
    """

    held: tuple[str, ...]
    bounds: tuple[tuple[float, float], ...]
    parts: int = 1

    def split_of(self, text: str) -> str:
        value = text_hash(text)
        for split, (low, high) in zip(self.held, self.bounds, strict=True):
            if low <= value < high:
                return split
        return "train"

    def documents(self, read: Read) -> Iterator[str]:
        """All documents of train in order, cut into parts if needed."""
        return (part for text in read() for part in cut(text, self.parts))


def text_hash(text: str) -> float:
    """A hash of the text, in [0, 1)."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def find(held: tuple[str, ...], holdout: float, read: Read, field: str) -> Holdout:
    """Plans to hold out a share `holdout` of the documents of `read()` for each split of `held`.

    validation owns the hashes [0, h) and test [h, 2h), unless they are given. UserError, with
    `field`: no division leaves every split non-empty.
    """
    owns = {"validation": (0.0, holdout), "test": (holdout, 2 * holdout)}
    wanted = Holdout(held, tuple(owns[split] for split in held))
    if not held or _fills_all(wanted, read):
        return wanted
    for tried in _finer(wanted, holdout, read):
        hashes = _smallest(text_hash(text) for text in tried.documents(read))
        if len(hashes) > len(held):
            return dataclasses.replace(tried, bounds=_repaired(tried, hashes))
    if not hashes:
        return wanted  # no documents: sources.documents raises the error
    given = " and ".join(f"config.data.{split}" for split in held)
    raise UserError(
        f"{field}: holds too little distinct text to be divided into "
        f"{', '.join(('train', *held))}: give {given}, or more text"
    )


def _finer(wanted: Holdout, holdout: float, read: Read) -> Iterator[Holdout]:
    """The candidate divisions in order: whole documents if there are many or they are too short to
    cut; then parts, whole documents, parts of any length."""
    sizes = [len(text) for text in itertools.islice(read(), MANY)]
    parts = min(max(round(1 / holdout), MANY), MAX_PARTS)
    cut_ = dataclasses.replace(wanted, parts=max(2, -(-parts // max(1, len(sizes)))))
    if len(sizes) < MANY and sum(sizes) >= SHORT * cut_.parts * len(sizes):
        yield cut_
    yield wanted
    yield cut_


def _fills_all(wanted: Holdout, read: Read) -> bool:
    """Reads as few documents as possible."""
    empty = {"train", *wanted.held}
    for text in wanted.documents(read):
        empty.discard(wanted.split_of(text))
        if not empty:
            return True
    return False


def _smallest(hashes: Iterator[float]) -> list[float]:
    """The FEW smallest distinct hashes, ascending, and the largest."""
    few: set[float] = set()
    largest = None
    for value in hashes:
        few.add(value)
        largest = value if largest is None else max(value, largest)
        if len(few) > 2 * FEW:
            few = set(heapq.nsmallest(FEW, few))
    return sorted(few | {largest} if few else few)


def _repaired(wanted: Holdout, hashes: list[float]) -> tuple[tuple[float, float], ...]:
    """Bounds that give every split of `held`, and train, at least one of the ascending `hashes`,
    with as few changes of split as possible."""
    count = len(hashes)
    ranges = []  # [first, last) of the hashes, for each split
    for low, high in wanted.bounds:
        first = sum(value < low for value in hashes)
        ranges.append([first, max(sum(value < high for value in hashes), first + 1)])
    for left, right in zip(ranges, ranges[1:], strict=False):  # room for the one before
        right[0] = max(right[0], left[1])
        right[1] = max(right[1], right[0] + 1)
    most = count - (ranges[0][0] == 0)  # leave one hash to train
    for i in reversed(range(len(ranges))):
        ranges[i][1] = min(ranges[i][1], most)
        ranges[i][0] = min(ranges[i][0], ranges[i][1] - 1)
        most = ranges[i][0]
    ends = [*hashes, 2.0]
    return tuple((ends[first], ends[last]) for first, last in ranges)


def cut(text: str, parts: int) -> Iterator[str]:
    """The text in `count` non-blank parts of about equal length, cut before white space if any."""
    start, step = 0, max(1, -(-len(text) // parts))
    stop = step
    while parts > 1 and stop < len(text):
        space = _SPACE.search(text, stop, stop + step // 2)
        stop = space.start() if space else stop
        if not text[stop:].strip():
            break
        if text[start:stop].strip():
            yield text[start:stop]
            start = stop
        stop += step
    yield text[start:]
