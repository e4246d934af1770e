"""Packing: token documents -> windows of at most L tokens -> records.

A record holds the window's valid tokens, little-endian; the rest of a window whose record is
shorter than L is padding. The generators hold one part and one window.
"""

from collections.abc import Iterable, Iterator

import numpy as np

PACKINGS = ("wrap", "pad")


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


def pad(documents: Iterable[list[int]], length: int, eos_id: int) -> Iterator[list[int]]:
    """One document per window: its first `length` tokens, and EOS if there is room for it."""
    for tokens in documents:
        yield (tokens[:length] + [eos_id])[:length]


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
