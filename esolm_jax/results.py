"""Result files and folders: complete or absent, never partially written."""

import contextlib
import json
import math
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

from esolm_jax.errors import UserError
from esolm_jax.files import workdir_lock


@contextlib.contextmanager
def draft_of(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A draft in the folder of `path`, renamed to `path` at the end; deleted on an error.

    Each call has its own draft, so two processes that write one file never mix their content.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a temporary file and renames it, so the old file exists until the new one is
    complete."""
    with draft_of(path) as draft:
        draft.write_text(text, encoding="utf-8")


def dumps(value, **options) -> str:
    """Strict JSON: a float that is not finite becomes null.

    Supports arrays and scalars of NumPy and JAX. `options` are those of json.dumps.
    """
    return json.dumps(_strict(value), allow_nan=False, **options)


def _strict(value):
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if hasattr(value, "tolist"):  # an array or a scalar of NumPy or JAX
        return _strict(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: pathlib.Path, value) -> None:
    write_text(path, dumps(value, indent=2) + "\n")


def check_can_write(*paths: pathlib.Path) -> None:
    """UserError unless these files can be written; called before the work that they hold."""
    for path in paths:
        if path.is_dir():
            raise UserError(
                f"{path}: must be a file, not a folder, because results are written to it"
            )
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"{path}: cannot be written: {path.parent} is read-only or missing")


def check_new_folder(flag: str, folder: pathlib.Path) -> None:
    """UserError unless the folder is new or empty."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag}={folder}: must be a new or empty folder, not a file")
    if folder.exists() and (there := sorted(path.name for path in folder.iterdir())):
        raise UserError(
            f"{flag}={folder}: must be a new or empty folder, but holds {', '.join(there[:5])}"
        )


@contextlib.contextmanager
def draft_beside(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty draft folder in the parent of `folder`; deleted at the end unless it was moved.

    Raises:
      UserError: another process has one.
    """
    draft = folder.with_name(f".{folder.name}.writing")
    with workdir_lock.hold(draft.parent, name=str(folder), file=f"{draft.name}.lock"):
        shutil.rmtree(draft, ignore_errors=True)  # left by a killed process
        draft.mkdir(parents=True)
        try:
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder to write to; it replaces `folder` at the end unless an error occurs."""
    folder = folder.resolve()
    with draft_beside(folder) as draft:
        yield draft
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
