"""The committed LLaDA, Dream and SDAR folders, and their converted models; their README says what
they are."""

import functools
import json
import pathlib
import tempfile

import numpy as np
from tiny_run import command

import esolm_jax

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "golden_models"
NAMES = ("llada_mha", "llada_gqa_tied", "dream", "dream_tied_bf16", "sdar")


@functools.cache
def read_npz(name: str, file: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name / f"{file}.npz") as stored:
        return {key: stored[key] for key in stored.files}


def case(name: str, file: str, key: str) -> dict[str, np.ndarray]:
    """The arrays of one case, by the rest of their names."""
    start = f"{key}."
    return {k[len(start) :]: a for k, a in read_npz(name, file).items() if k.startswith(start)}


@functools.cache
def read_json(name: str, file: str = "cases"):
    return json.loads((FOLDER / name / f"{file}.json").read_text(encoding="utf-8"))


def convert(source, workdir, *args) -> int:
    return command(
        "convert", f"--from={source}", f"--workdir={workdir}", *args, "--config.mesh.devices=1"
    )


@functools.cache
def workdir(name: str) -> pathlib.Path:
    """The folder, converted by the verb; once per process."""
    keep = tempfile.mkdtemp(prefix=f"{name}_")
    made = pathlib.Path(keep) / name
    assert convert(FOLDER / name, made) == 0
    return made


@functools.cache
def model(name: str) -> esolm_jax.LanguageModel:
    """The converted model, loaded."""
    return esolm_jax.load(workdir(name))
