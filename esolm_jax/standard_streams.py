"""Standard output and error that outlive their reader: a verb does not stop where it cannot print.

Results are files; what is printed tells of them. So when the reader leaves (`sample | head -1`),
the work goes on without a word and ends with exit code 0. When standard output is a file on a full
disk, the results are still written, and then the verb ends with one line.
"""

import codecs
import contextlib
import errno
import io
import os
import sys

failures: list[OSError] = []  # of standard output, other than a reader that left


class _Descriptor(io.FileIO):
    """A file descriptor that accepts everything; the first failure is kept."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EPIPE and self.fileno() == 1 and not failures:
                failures.append(error)
            return len(data)


def _encodable(error: UnicodeError):
    """Bytes of a file's name that are no text come back as they were; else \\x and \\u escapes."""
    if isinstance(error, UnicodeEncodeError):
        with contextlib.suppress(UnicodeError):
            return codecs.lookup_error("surrogateescape")(error)
    return codecs.backslashreplace_errors(error)


def install() -> None:
    """Puts such streams in place of sys.stdout and sys.stderr; call once, before anything opens
    files: a closed descriptor 1 or 2 would be given to the next file, and logs be written to it."""
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
