"""Known text → token ids that decode to exactly this text, whatever stands around them.

A tokenizer's own encoding of a part of a text may differ from the part: a space is put in front,
white space is joined, characters are normalised or unknown. Here a part is encoded behind an
anchor, as within a text, and what its tokens add (surfaces.py) is compared with it. Where they
differ, up to the end of the word, the fewest tokens are taken that spell it; where none do, the
character is named.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from esolm_jax.data.surfaces import Surfaces

# What a part is encoded behind, so that nothing is put in front of it, and nothing of it merges
# with what is there: a character that no vocabulary knows, and some that do not occur in words.
# "": as a text of its own, which is right for tokenizers that put nothing in front.
ANCHORS = ("", "\ue000", "\n", ".", "a", "0")
# Characters that are encoded again behind a difference, and the most that are spelled at a time.
WINDOW, WORD = 128, 64
_WORD = re.compile(rf"\s{{0,{WORD}}}\S{{0,{WORD}}}")


class NotKept(ValueError):
    """The tokenizer cannot spell a character of a text.

    Attributes:
      at: its place in the text.
      becomes: (a stretch of the text around it, what the tokenizer would make of this).
    """

    def __init__(self, at: int, becomes: tuple[str, str]):
        super().__init__(at, becomes)
        self.at, self.becomes = at, becomes


class TooLong(ValueError):
    """More tokens than the limit."""


@dataclasses.dataclass(frozen=True)
class _Encoder:
    tokenizer: Any
    surfaces: Surfaces

    def encode(self, text: str, begins: bool, limit: int) -> list[int]:
        if len(text) > limit * self.surfaces.longest:
            raise TooLong
        window, ids, at = text, [], 0
        while True:
            more, count = self._matching(window, begins and not ids)
            ids, at = ids + more, at + count
            if count < len(window):  # the word behind the last that is right
                stop = _WORD.match(text, at).end()
                ids, at = ids + self._spelled(text, at, stop, begins and not ids), stop
            if len(ids) > limit:
                raise TooLong
            if at == len(text):
                return ids
            window = _cut(text[at : at + WINDOW + 1])

    def _matching(self, text: str, begins: bool) -> tuple[list[int], int]:
        """(tokens, how many characters they are) of the most of `text`, from its start, that the
        tokenizer encodes so that it decodes alike."""
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
        """The tokens of `ids` that add `data` from its start, and how many bytes these are; whole
        characters alone."""
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
        # For each byte, (tokens to there, the last of them and where it begins).
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
    """Without its last word, if it is one character longer than WINDOW."""
    if len(window) <= WINDOW:
        return window
    end = max(window.rfind(" ", 1), window.rfind("\n", 1))
    return window[: end if end > 0 else WINDOW]


def encode(tokenizer: Any, text: str, *, begins: bool, limit: int) -> list[int]:
    """Ids of a part of a text that decode to it: known text is kept exactly.

    Args:
      begins: the text begins with it; else other tokens come before.
      limit: how many tokens it may have.

    Raises:
      NotKept: the tokenizer has no tokens that do.
      TooLong: more than `limit` tokens.
    """
    if not text:
        return []
    if tokenizer.surfaces is None:
        raise NotKept(0, (text[:16], "a text that depends on the tokens around it"))
    return _Encoder(tokenizer, tokenizer.surfaces).encode(text, begins, limit)


def spans(tokenizer: Any, text: str, ids: list[int]) -> list[tuple[int, int]]:
    """[start, stop) in characters of each of the ids that `encode` gave for a whole text: of those
    that spell a part of a character, the whole character."""
    s, at, found = tokenizer.surfaces, 0, []
    starts, chars = [], 0  # of each byte, the character that it is of
    for character in text:
        starts += [chars] * len(character.encode())
        chars += 1
    for n, i in enumerate(ids):
        end = at + len((s.first if n == 0 else s.inside)[i])
        found.append((starts[at], starts[end - 1] + 1) if end > at else (starts[at], starts[at]))
        at = end
    return found
