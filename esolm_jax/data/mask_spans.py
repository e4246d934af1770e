"""[MASK] and [MASK:n] in the text of a prompt. Needs the standard library alone: exported folders
hold a copy of this file."""

import re
from collections.abc import Iterator

_OPEN, _COUNT = "[MASK", re.compile(r"0*[1-9]\d{0,5}")


def check_unicode(text: str) -> None:
    """ValueError if the text has a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"must be Unicode, but character {error.start} is a lone surrogate"
        raise ValueError(message) from error


def find(text: str) -> Iterator[tuple[int, int, int]]:
    """(start, stop, number of tokens) of each [MASK] and [MASK:n], in one pass over the text; a
    regular expression would be quadratic in the number of [MASK:.

    Raises:
      ValueError: n is not in 1..999999.
    """
    at = 0
    while (start := text.find(_OPEN, at)) >= 0:
        at = start + len(_OPEN)
        if text[at : at + 1] == "]":
            at += 1
            yield start, at, 1
        elif text[at : at + 1] == ":":
            stop = text.find("]", at)
            if stop < 0:
                return
            if not _COUNT.fullmatch(text, at + 1, stop):
                span = text[start : stop + 1][:80]
                raise ValueError(f"{span!r}: must be [MASK], or [MASK:n] with n in 1..999999")
            yield start, stop + 1, int(text[at + 1 : stop])
            at = stop + 1


def advice(text: str, at: int) -> str:
    """What to do about a character that the tokenizer cannot spell."""
    if text[at].isspace() and text[at + 1 :].lstrip().startswith(_OPEN):
        return "leave it out: the token in place of [MASK] can add a space itself"
    return "write what it can spell"
