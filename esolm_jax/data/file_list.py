"""The files of a corpus that config.data.train etc. name, and the files that are left out."""

import dataclasses
import glob
import itertools
import os
from pathlib import Path

from esolm_jax.data import compressed, table_files
from esolm_jax.errors import UserError

_TEXT = (".txt", ".jsonl")
SUFFIXES = (
    *_TEXT,
    *(kind + packed for packed in compressed.SUFFIXES for kind in _TEXT),
    *table_files.SUFFIXES,
)
MAX_MATCHES = 1_000_000  # of a glob


@dataclasses.dataclass(frozen=True)
class FileList:
    """The files of a split, sorted, and the paths among them that are left out.

    left_out: reason ("broken links", …) → paths.
    """

    files: list[Path]
    left_out: dict[str, set[str]]

    def note(self, field: str) -> str:
        """One line on the paths left out, or ''."""
        parts = [
            f"{len(paths)} {reason} (such as {min(paths)})"
            for reason, paths in self.left_out.items()
        ]
        return f"{field}: left out {', '.join(parts)}" if parts else ""


def is_text(path: str | Path) -> bool:
    """Whether the suffix is one of SUFFIXES, in lower or upper case."""
    return str(path).lower().endswith(SUFFIXES)


def is_json_lines(path: str | Path) -> bool:
    """Whether the suffix, without that of a compression, is .jsonl."""
    name = str(path).lower()
    for packed in compressed.SUFFIXES:
        name = name.removesuffix(packed)
    return name.endswith(".jsonl")


def find(split: str, spec: str) -> FileList:
    """The files of a comma-separated list of files, directories and globs. Links are followed; a
    file with several names is read once.

    Raises UserError naming config.data.<split> for paths that are missing or not text files.
    """
    walk, names = _Walk(), set()
    field, endings = f"config.data.{split}={spec!r}", ", ".join(SUFFIXES)
    for part in filter(None, (p.strip() for p in spec.split(","))):
        part = os.path.abspath(os.path.expanduser(part))
        if os.path.isfile(part):
            if not is_text(part):
                raise UserError(f"{field}: {part}: must end with one of {endings}")
            matches = [part]
        elif os.path.isdir(part):
            matches = [part]
        elif glob.has_magic(part):
            matches = _matches(part, field)
        elif os.path.exists(part):
            raise UserError(f"{field}: {part}: must be a regular file, not a pipe or a device")
        else:
            kind = "broken link" if os.path.islink(part) else "no such file or directory"
            raise UserError(f"{field}: {kind}: {part}")
        files = walk.files(matches)
        if not files:
            raise UserError(f"{field}: {part}: must hold files that end with {endings}")
        names.update(map(Path, files))
    if not names:
        raise UserError(f"{field}: must name files")
    return FileList(_once(sorted(names), walk.left_out), walk.left_out)


def _matches(pattern: str, field: str) -> list[str]:
    """The paths that match a glob. UserError: too many, for example because of circular links."""
    paths = list(itertools.islice(glob.iglob(pattern, recursive=True), MAX_MATCHES + 1))
    if len(paths) > MAX_MATCHES:
        raise UserError(
            f"{field}: {pattern} matches more than {MAX_MATCHES:,} paths; name the folder, or "
            "remove circular links"
        )
    return sorted(paths)


class _Walk:
    """Finds the text files at and below paths; left_out as in FileList."""

    def __init__(self):
        self.left_out: dict[str, set[str]] = {}

    def files(self, paths: list[str]) -> list[str]:
        """Visits each folder once."""
        files, folders, links, seen = [], [], [], set()
        for path in paths:
            self._sort(path, files, folders, links)
        # Links last, so that a file is listed by its real name.
        while folders or links:
            path = folders.pop() if folders else links.pop(0)
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                if os.path.islink(path):
                    self._leave_out("links to folders that are read already", path)
                continue
            seen.add((status.st_dev, status.st_ino))
            try:
                names = sorted(os.listdir(path))
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from error
            for name in names:
                self._sort(os.path.join(path, name), files, folders, links)
        return files

    def _sort(self, path: str, files: list[str], folders: list[str], links: list[str]) -> None:
        """Appends the path to one of the lists, or leaves it out."""
        if os.path.isdir(path):
            (links if os.path.islink(path) else folders).append(path)
        elif not os.path.exists(path):
            self._leave_out("broken links", path)
        elif not is_text(path):
            self._leave_out("files that end otherwise", path)
        elif not os.path.isfile(path):
            self._leave_out("pipes or devices", path)
        else:
            if not os.path.getsize(path):
                self._leave_out("empty files", path)
            files.append(path)

    def _leave_out(self, reason: str, path: str) -> None:
        self.left_out.setdefault(reason, set()).add(path)


def _once(paths: list[Path], left_out: dict[str, set[str]]) -> list[Path]:
    """One path for each file; further names go to left_out."""
    files: dict[str, Path] = {}
    for path in paths:
        if files.setdefault(os.path.realpath(path), path) != path:
            left_out.setdefault("further names of the same file", set()).add(str(path))
    return list(files.values())


def shared(lists: dict[str, FileList]) -> list[str]:
    """One line for each pair of splits that share files."""
    real = {s: {os.path.realpath(f) for f in found.files} for s, found in lists.items()}
    splits = list(lists)
    return [
        f"config.data.{a} and config.data.{b} have {len(real[a] & real[b])} files in common "
        f"(such as {min(real[a] & real[b])})"
        for i, a in enumerate(splits)
        for b in splits[i + 1 :]
        if real[a] & real[b]
    ]
