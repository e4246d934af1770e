"""Errors made by bad input: one clear line for the person at the keyboard, no traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message names the field, the value, and the allowed values."""


def brief(error: BaseException) -> str:
    """A library's error for a message: its type and at most 200 characters, on one line."""
    what = " ".join(ascii(str(error)[:1000])[1:-1].replace("\\n", " ").split())[:200]
    return f"{type(error).__name__}: {what}"


def is_panic(error: BaseException) -> bool:
    """Whether it is a panic of a library written in Rust, which is a BaseException but does not
    end the process."""
    return type(error).__name__ == "PanicException"


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the closest allowed name, or "" if none is close."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
