"""The lines of metrics.jsonl, each with a checksum.

A killed run can leave the last line torn. Other damaged lines are dropped; intact lines are kept,
and a copy of the damaged file is kept in the same folder.
"""

import dataclasses
import json
import pathlib
import shutil
import zlib

from esolm_jax import results
from esolm_jax.files import regular_file

CHECKSUM = "crc32"  # checksum of the line without it
_MAX_BYTES = 2**33


@dataclasses.dataclass(frozen=True)
class Content:
    """The content of a metrics file.

    Attributes:
      entries: the entries of the intact lines, without checksums.
      lines: the intact lines, unchanged.
      damaged: numbers of the damaged lines, from 1; a torn last line is not one of them.
    """

    entries: list[dict]
    lines: list[str]
    damaged: list[int]


def line_of(entry: dict) -> str:
    """The entry as a line of JSON, with its checksum."""
    text = results.dumps(entry)
    return f'{text[:-1]}, "{CHECKSUM}": "{zlib.crc32(text.encode()):08x}"}}'


def _entry(line: str, *, must_have_checksum: bool) -> tuple[dict, bool]:
    """The entry, and whether it has a checksum. ValueError if the line is damaged."""
    entry = json.loads(line)
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        raise ValueError("no step")
    has_checksum = CHECKSUM in entry
    if has_checksum:
        checksum = entry.pop(CHECKSUM)
        text, found, _ = line.rpartition(f', "{CHECKSUM}": ')
        if not found or checksum != f"{zlib.crc32((text + '}').encode()):08x}":
            raise ValueError("not its checksum")
    elif must_have_checksum or any(isinstance(value, str) for value in entry.values()):
        # No metric is a string, so a string is a checksum with a damaged name.
        raise ValueError("no checksum")
    return entry, has_checksum


def parse(content: bytes) -> Content:
    """Lines without checksums, of earlier versions, are valid before the first line with one."""
    *whole, last = content.split(b"\n")
    entries, lines, damaged, checked = [], [], [], False
    for number, raw in enumerate([*whole, last] if last else whole, start=1):
        try:
            line = raw.decode("utf-8")
            entry, has_checksum = _entry(line, must_have_checksum=checked)
        except (ValueError, RecursionError):
            if number <= len(whole):
                damaged.append(number)
            continue
        checked |= has_checksum
        entries.append(entry)
        lines.append(line)
    return Content(entries, lines, damaged)


def read(path: pathlib.Path) -> Content:
    """The content of the file; empty if it is missing. UserError if it cannot be read."""
    if not regular_file.is_there(path):
        return Content([], [], [])
    return parse(regular_file.read_bytes(path, _MAX_BYTES))


def _back_up(path: pathlib.Path) -> pathlib.Path:
    """Copies a damaged file to PATH.damaged-1, or the next free number; the path of the copy."""
    number = 1
    while (copy := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    if path.is_file():
        shutil.copy2(path, copy)
    else:
        path.rename(copy)
    return copy


def keep_until(path: pathlib.Path, step: int, expected: int) -> tuple[int, str | None]:
    """Drops entries after the checkpoint at `step`, which a resumed run writes again.

    Args:
      expected: the number of entries up to `step` recorded in the checkpoint; 0: not recorded.

    Returns:
      (the number of entries left, a line on damaged or missing entries or None).
    """
    backup = None
    if path.exists() and not path.is_file():
        backup = _back_up(path)
    content = read(path)
    if content.damaged:
        backup = _back_up(path)
    kept = [
        line for line, e in zip(content.lines, content.entries, strict=True) if e["step"] <= step
    ]
    results.write_text(path, "".join(f"{line}\n" for line in kept))
    notes = []
    if content.damaged:
        where = ", ".join(map(str, content.damaged[:5]))
        more = ", …" if len(content.damaged) > 5 else ""
        plural = "lines" if len(content.damaged) > 1 else "line"
        notes.append(f"{plural} {where}{more} damaged and left out")
    if len(kept) < expected:
        notes.append(f"{expected - len(kept)} of {expected} entries up to step {step} are missing")
    if backup:
        notes.append(f"the file is kept as {backup.name}")
    return len(kept), f"{path}: {'; '.join(notes)}" if notes else None
