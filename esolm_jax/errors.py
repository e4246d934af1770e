"""Errors made by bad input: one clear line for the person at the keyboard, no traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message names the field, the value, and what is allowed."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the closest allowed name, or "" if none is close."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
