"""The data of a suite: files below --data_root, prepared in the workdir on first use."""

import pathlib
import re
from collections.abc import Sequence

from esolm_jax import config as config_lib
from esolm_jax.data import build, file_list
from esolm_jax.data.tokenizer import MODEL_FILE
from esolm_jax.errors import UserError
from esolm_jax.evaluation.suite.suite_file import DataSet

_KINDS = ("parquet", "arrow", "jsonl", "txt")  # the first that a folder has is read


def files_of(data_set: DataSet, root: pathlib.Path) -> list[pathlib.Path]:
    """The files of a data set: those below its folder whose path has the split as a word."""
    folder = root / data_set.folder
    word = re.compile(rf"(?:^|[-_./]){re.escape(data_set.split)}(?:[-_./]|$)")
    found = [
        path
        for path in (sorted(folder.rglob("*")) if folder.is_dir() else [])
        if path.is_file() and file_list.is_text(path) and word.search(str(path.relative_to(folder)))
    ]
    for kind in _KINDS:
        chosen = [path for path in found if f".{kind}" in path.name.lower()]
        if chosen:
            return chosen
    return []


def find(data_sets: Sequence[DataSet], root: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """The files of each data set, by name; [] if there are none.

    Raises:
      UserError: no data set has files; lists all.
    """
    if not root.is_dir():
        raise UserError(f"--data_root={root}: no such folder")
    found = {data_set.name: files_of(data_set, root) for data_set in data_sets}
    if not any(found.values()):
        raise UserError(
            f"--data_root={root}: has the files of no data set of the suite: "
            + "; ".join(missing_note(data_set, root) for data_set in data_sets)
        )
    return found


def missing_note(data_set: DataSet, root: pathlib.Path) -> str:
    """Where the files of a data set should be, and where they come from."""
    place = root / data_set.folder
    return (
        f"{data_set.title}: no .parquet, .arrow, .jsonl or .txt with {data_set.split!r} in its "
        f"name below {place} ({data_set.origin})"
    )


def config_of(config, data_set: DataSet, files: list[pathlib.Path], tokenizer: dict, mode: str):
    """The config that prepares a data set for the model of `config`.

    Args:
      tokenizer: kind, and path of the files in the workdir. mode: of config.data.window_mode.
    """
    spec = ",".join(map(str, files)) + data_set.range
    fields = {
        **data_set.data_fields(),
        "data.source": "text",
        "data.files": "",
        "data.train": "",
        "data.validation": "",
        "data.test": spec,
        "data.packing": "wrap",
        "data.window_mode": mode,
        "data.tokenizer": tokenizer["kind"],
        "data.tokenizer_path": tokenizer["path"],
        "data.tokenizer_ids": 0,
    }
    return config_lib.overridden(config, fields)


def tokenizer_files(workdir: pathlib.Path, kind: str) -> dict[str, str]:
    """kind and path of the tokenizer that a workdir holds, as fields of config.data."""
    folder = workdir / "tokenizer"
    needs = {"bytes": "", "text8": "", "sentencepiece": str(folder / MODEL_FILE)}
    return {"kind": kind, "path": needs.get(kind, str(folder))}


def folder_of(config, workdir: pathlib.Path, suite: str, data_set: DataSet) -> pathlib.Path:
    """The folder of the prepared data."""
    name = f"{data_set.name}-{config.data.seq_len}-{config.data.window_mode}"
    return workdir / "suites" / suite / "data" / name


def prepare(config, folder: pathlib.Path) -> None:
    """Prepares a data set, unless that is done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    manifest = build.prepare(config, folder)
    for note in manifest.notes():
        print(f"note: {note}")
