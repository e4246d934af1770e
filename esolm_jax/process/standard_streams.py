"""Standard output and error that survive a closed pipe: a verb continues if it cannot print.

Results are files. So if the reader closes the pipe (`sample | head -1`), the verb continues
silently and ends with exit code 0. If standard output is a file on a full disk, the results are
still written, and the verb then ends with one line of error.
"""

import codecs
import contextlib
import errno
import io
import os
import sys

failures: list[OSError] = []  # of standard output, other than a closed pipe


class _Descriptor(io.FileIO):
    """A file descriptor whose writes never fail; the first error is recorded."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EPIPE and self.fileno() == 1 and not failures:
                failures.append(error)
            return len(data)


def _encodable(error: UnicodeError):
    """Undecodable bytes of a file name are written unchanged, other characters as \\x or \\u."""
    if isinstance(error, UnicodeEncodeError):
        with contextlib.suppress(UnicodeError):
            return codecs.lookup_error("surrogateescape")(error)
    return codecs.backslashreplace_errors(error)


def install() -> None:
    """Replaces sys.stdout and sys.stderr; call once, before any file is opened: the next file
    would get a closed descriptor 1 or 2, and logs would be written to it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    codecs.register_error("esolm_printable", _encodable)
    sys.stdout, sys.stderr = (
        _stream(n, getattr(sys, s)) for n, s in ((1, "stdout"), (2, "stderr"))
    )


def _stream(number: int, was) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(number, "w", closefd=False)),
        encoding=getattr(was, "encoding", None) or "utf-8",
        errors="esolm_printable",
        line_buffering=number == 2 or os.isatty(number),
    )
