"""Safetensors files: read tensor by tensor, written whole."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy

from esolm_jax.errors import UserError

METADATA = "esolm_jax"  # the key under which our own exports say what they hold


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file. np.asarray(tensor) reads it."""

    file: safetensors.safe_open
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        del copy
        return np.asarray(self.file.get_tensor(self.name), dtype)


def read(path: pathlib.Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors by name, and what our export said of them ({} for a file of others).

    Raises UserError: no such file, truncated, or not safetensors.
    """
    try:
        file = safetensors.safe_open(path, framework="np")
        slices = {name: file.get_slice(name) for name in file.keys()}
        about = _about((file.metadata() or {}).get(METADATA, "{}"))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: truncated, or not a safetensors file: {error}") from error
    tensors = {
        name: Tensor(file, name, tuple(part.get_shape()), part.get_dtype())
        for name, part in slices.items()
    }
    return tensors, about


def _about(text: str) -> dict:
    """What `write` was given; {} if it is of another make."""
    about = json.loads(text)
    is_ours = isinstance(about, dict) and all(
        isinstance(about.get(name), kind)
        for name, kind in (("config", dict), ("tokenizer", dict), ("weights", str))
    )
    return about if is_ours else {}


def write(path: pathlib.Path, tensors: Mapping[str, np.ndarray], about: dict) -> None:
    """Writes beside the file first and renames. `about`: JSON-able, kept in the metadata."""
    # The library writes the memory of an array, whatever its strides say.
    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    metadata = {"format": "pt", METADATA: json.dumps(about)}
    draft = path.with_name(path.name + ".tmp")
    safetensors.numpy.save_file(whole, draft, metadata)
    os.replace(draft, path)
