"""Packing: token documents -> windows of at most L tokens -> records.

A record holds the window's valid tokens, little-endian; the rest of a window whose record is
shorter than L is padding. The generators hold one part and one window.
"""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

PACKINGS = ("wrap", "pad")
MODES = ("all", "published")  # of config.data.windows
GROUP = 1000  # documents that the published code joins, dropping what remains of each group


def record_dtype(num_ids: int) -> str:
    """'<u2' if every id below `num_ids` fits in 16 bits, else '<u4'."""
    return "<u2" if num_ids <= 2**16 else "<u4"


def wrap(documents: Iterable[list[int]], length: int, eos_id: int) -> Iterator[list[int]]:
    """Documents, each closed by EOS, joined, and cut every `length`; the last may be short."""
    return cut((tokens + [eos_id] for tokens in documents), length)


def cut(parts: Iterable[list[int]], length: int) -> Iterator[list[int]]:
    """Parts of documents, joined, and cut every `length`; the last may be short."""
    buffer: list[int] = []
    for tokens in parts:
        buffer += tokens
        whole = len(buffer) - len(buffer) % length
        for start in range(0, whole, length):
            yield buffer[start : start + length]
        del buffer[:whole]
    if buffer:
        yield buffer


def group_sizes(num_documents: int, group: int, num_shards: int) -> Iterator[int]:
    """The numbers of documents of the groups that the published code joins.

    The documents are divided into min(num_shards, documents) contiguous shards, the first ones one
    document longer, and each shard into groups of `group` documents.
    """
    num_shards = max(min(num_shards, num_documents), 1)
    size, longer = divmod(num_documents, num_shards)
    for i in range(num_shards):
        left = size + (i < longer)
        while left > 0:
            yield min(group, left)
            left -= group


def cut_groups(
    documents: Iterable[list[int]], length: int, sizes: Iterable[int]
) -> Iterator[list[int]]:
    """Groups of as many documents as `sizes` says, each joined and cut every `length`; what remains
    of a group is dropped."""
    documents = iter(documents)
    for size in sizes:
        group = list(itertools.islice(documents, size))
        if not group:
            return
        yield from (window for window in cut(group, length) if len(window) == length)


def surround(windows: Iterable[list[int]], specials: tuple[int, int] | None) -> Iterator[list[int]]:
    """Each window between two special ids; unchanged for None."""
    if specials is None:
        yield from windows
        return
    first, last = specials
    for window in windows:
        yield [first, *window, last]


def pad(documents: Iterable[list[int]], length: int, eos_id: int | None) -> Iterator[list[int]]:
    """One document per window: its first `length` tokens, and EOS if there is room for it.
    eos_id None: no EOS."""
    end = [] if eos_id is None else [eos_id]
    for tokens in documents:
        yield (tokens[:length] + end)[:length]


def to_record(window: list[int], dtype: str) -> bytes:
    return np.asarray(window, dtype).tobytes()


def from_record(
    record: bytes, dtype: str, length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns x int32 [length], padded with `pad_id`, and valid bool [length]."""
    tokens = np.frombuffer(record, dtype)
    x = np.full(length, pad_id, np.int32)
    x[: len(tokens)] = tokens
    return x, np.arange(length) < len(tokens)
