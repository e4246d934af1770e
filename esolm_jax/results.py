"""Result files: whole or not there, never half-written."""

import json
import os
import pathlib


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes beside the file first and renames, so that what was there stays until it is done."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def write_json(path: pathlib.Path, value) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
