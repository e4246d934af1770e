"""Known text → token ids that decode to exactly this text, independent of the surrounding tokens.

A tokenizer's own encoding of a part of a text may not decode to the part: it adds a leading space,
joins white space, normalises characters or does not know them. Here a part is encoded after an
anchor, as inside a text, and the surfaces of its tokens (surfaces.py) are compared with the part.
From a difference to the end of the word, the fewest tokens that spell the text are taken. If no
tokens spell a character, the error names it.

Needs the standard library alone: exported folders hold a copy of this file.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

# Anchors: a part is encoded after one of these, so that it gets no leading space and does not merge
# with the anchor. A character that no vocabulary knows, and some that do not occur in words.
# "": no anchor, for tokenizers that add no leading space.
ANCHORS = ("", "\ue000", "\n", ".", "a", "0")
# Characters to encode again after a difference, and the most to spell at a time.
WINDOW, WORD = 128, 64
_WORD = re.compile(rf"\s{{0,{WORD}}}\S{{0,{WORD}}}")


class NotKept(ValueError):
    """The tokenizer cannot spell a character of a text.

    Attributes:
      at: its index in the text.
      becomes: (the text around it, the tokenizer's rendering of that text).
    """

    def __init__(self, at: int, becomes: tuple[str, str]):
        super().__init__(at, becomes)
        self.at, self.becomes = at, becomes


class TooLong(ValueError):
    """More tokens than the limit."""


@dataclasses.dataclass(frozen=True)
class _Encoder:
    tokenizer: Any
    surfaces: Any  # surfaces.Surfaces, or spelling.Surfaces of an exported folder

    def encode(self, text: str, begins: bool, limit: int) -> list[int]:
        if len(text) > limit * self.surfaces.longest:
            raise TooLong
        window, ids, at = text, [], 0
        while True:
            more, count = self._matching(window, begins and not ids)
            ids, at = ids + more, at + count
            if count < len(window):  # the word after the last match
                stop = _WORD.match(text, at).end()
                ids, at = ids + self._spelled(text, at, stop, begins and not ids), stop
            if len(ids) > limit:
                raise TooLong
            if at == len(text):
                return ids
            window = _cut(text[at : at + WINDOW + 1])

    def _matching(self, text: str, begins: bool) -> tuple[list[int], int]:
        """(tokens, number of characters) of the longest prefix of `text` whose encoding decodes to
        itself."""
        best, most = [], 0
        if not text:
            return best, most
        for candidate in self._candidates(text, begins):
            ids, count = self._matched(candidate, text.encode(), begins)
            if count > most:
                best, most = ids, count
            if most == len(text.encode()):
                break
        return best, len(text.encode()[:most].decode())

    def _candidates(self, text: str, begins: bool) -> Iterator[list[int]]:
        for anchor in ANCHORS[:1] if begins else ANCHORS:
            head = self.tokenizer.encode(anchor) if anchor else []
            ids = self.tokenizer.encode(anchor + text)
            if ids[: len(head)] == head:
                yield ids[len(head) :]

    def _matched(self, ids: list[int], data: bytes, begins: bool) -> tuple[list[int], int]:
        """The leading tokens of `ids` that spell a prefix of `data`, and its length in bytes; whole
        characters only."""
        s, at, kept = self.surfaces, 0, (0, 0)
        for n, i in enumerate(ids):
            piece = (s.first if begins and n == 0 else s.inside)[i]
            if not s.spells[i] or not data.startswith(piece, at):
                break
            at += len(piece)
            if at == len(data) or data[at] & 0xC0 != 0x80:
                kept = n + 1, at
        return ids[: kept[0]], kept[1]

    def _spelled(self, text: str, start: int, stop: int, begins: bool) -> list[int]:
        """The fewest tokens that spell text[start:stop]."""
        data, s = text[start:stop].encode(), self.surfaces
        # For each byte: (number of tokens so far, the last token, its start).
        best: list[tuple[int, int, int] | None] = [None] * (len(data) + 1)
        if begins:
            for piece, i in s.by_first_bytes.items():
                if data.startswith(piece):
                    best[len(piece)] = 1, i, -1
        else:
            best[0] = 0, -1, -1
        for at in range(len(data)):
            if best[at] is None:
                continue
            count = best[at][0] + 1
            for end in range(at + 1, min(len(data), at + s.longest) + 1):
                i = s.by_bytes.get(data[at:end])
                if i is not None and (best[end] is None or best[end][0] > count):
                    best[end] = count, i, at
        if best[-1] is None:
            last = max((n for n, found in enumerate(best) if found is not None), default=0)
            raise self._not_kept(text, start + len(data[:last].decode(errors="ignore")))
        ids, at = [], len(data)
        while at >= 0 and best[at][0]:
            ids.append(best[at][1])
            at = best[at][2]
        return ids[::-1]

    def _not_kept(self, text: str, at: int) -> NotKept:
        around = text[max(0, at - 8) : at + 8]
        becomes = self.tokenizer.decode(self.tokenizer.encode(around))
        return NotKept(at, (around, becomes))


def _cut(window: str) -> str:
    """The window without its last word, if it is one character longer than WINDOW."""
    if len(window) <= WINDOW:
        return window
    end = max(window.rfind(" ", 1), window.rfind("\n", 1))
    return window[: end if end > 0 else WINDOW]


def encode(tokenizer: Any, text: str, *, begins: bool, limit: int) -> list[int]:
    """Ids that decode to exactly this part of a text.

    Args:
      begins: the part is the beginning of the text; else other tokens precede it.
      limit: the maximum number of tokens.

    Raises:
      NotKept: the tokenizer cannot spell it.
      TooLong: more than `limit` tokens.
    """
    if not text:
        return []
    if tokenizer.surfaces is None:
        raise NotKept(0, (text[:16], "a text that depends on the tokens around it"))
    return _Encoder(tokenizer, tokenizer.surfaces).encode(text, begins, limit)


def spans(tokenizer: Any, text: str, ids: list[int]) -> list[tuple[int, int]]:
    """The characters [start, stop) of each id that `encode` returned for a whole text; an id for a
    part of a character gets the whole character."""
    s, at, found = tokenizer.surfaces, 0, []
    starts, chars = [], 0  # for each byte, the index of its character
    for character in text:
        starts += [chars] * len(character.encode())
        chars += 1
    for n, i in enumerate(ids):
        end = at + len((s.first if n == 0 else s.inside)[i])
        found.append((starts[at], starts[end - 1] + 1) if end > at else (starts[at], starts[at]))
        at = end
    return found
