"""Long documents are tokenized in parts, so that memory does not grow with their length.

A part ends before white space, where the tokens of the surrounding text equal those of its two
sides. Each cut is tested, so the tokens are those of the whole document for every treatment of the
space: attached to the next word, dropped, or added in front of every text. Only words of more than
MAX_WORD characters are cut.
"""

import re
from collections.abc import Iterator
from typing import Any

PART = 2**20  # characters; shorter documents are encoded whole
MAX_WORD = 2**22
TRIED = 64  # candidate cuts
CONTEXT = 256  # characters on each side of a cut
_SPACE = re.compile(r"(?<=\S)\s")


def encode(tokenizer: Any, text: str) -> Iterator[list[int]]:
    """The tokens of a document, in parts."""
    start = 0
    while len(text) - start > PART:
        stop, begin = _cut(tokenizer, text, start)
        yield tokenizer.encode(text[start:stop])
        start = begin
    if not start:
        yield tokenizer.encode(text)
    elif start < len(text):
        yield tokenizer.encode(text[start:])


def _cut(tokenizer: Any, text: str, start: int) -> tuple[int, int]:
    """The end of the part that begins at `start`."""
    if tokenizer.kind == "bytes":
        return start + PART, start + PART
    spaces = _SPACE.finditer(text, start + PART, start + MAX_WORD)
    for match, _ in zip(spaces, range(TRIED), strict=False):
        index = match.start()
        low, high = max(start, index - CONTEXT), index + CONTEXT
        whole = tokenizer.encode(text[low:high])
        for stop, begin in ((index, index), (index, index + 1), (index + 1, index + 1)):
            sides = tokenizer.encode(text[low:stop]) + tokenizer.encode(text[begin:high])
            if sides == whole:
                return stop, begin
    stop = min(start + MAX_WORD, len(text))
    return stop, stop


def num_bytes(text: str) -> int:
    """The number of UTF-8 bytes, without a copy of the text."""
    return sum(len(text[i : i + PART].encode()) for i in range(0, len(text), PART))
