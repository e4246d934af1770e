"""The committed vectors of the published evaluation protocols; their README says what they are."""

import functools
import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "golden_eval"


@functools.cache
def read_json(name: str):
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


@functools.cache
def read_npz(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name) as file:
        return {key: file[key] for key in file.files}
