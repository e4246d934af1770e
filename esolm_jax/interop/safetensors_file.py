"""Safetensors files: read and written tensor by tensor."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np
import safetensors

from esolm_jax import results
from esolm_jax.errors import UserError

METADATA = "esolm_jax"  # the key under which our own exports say what they hold
ALIGNMENT = 64  # bytes, of the data within the file


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


def places(path: pathlib.Path) -> dict[str, tuple[int, tuple[int, ...]]]:
    """(offset in bytes within the file, shape) of each tensor."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: (8 + size + entry["data_offsets"][0], tuple(entry["shape"]))
        for name, entry in header.items()
    }


def _about(text: str) -> dict:
    """What `write` was given; {} if it is of another make."""
    about = json.loads(text)
    is_ours = isinstance(about, dict) and all(
        isinstance(about.get(name), kind)
        for name, kind in (("config", dict), ("tokenizer", dict), ("weights", str))
    )
    return about if is_ours else {}


def write(
    path: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    about: dict,
) -> None:
    """Writes float32 tensors one at a time, beside the file first, and renames.

    The library would want all of them in memory at once.

    Args:
      shapes: by name. tensors: (name, array) in the same order; each is dropped once written.
      about: JSON-able, kept in the metadata.
    """
    header: dict = {"__metadata__": {"format": "pt", METADATA: results.dumps(about)}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    with results.draft_of(path) as draft, open(draft, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, array), wanted in zip(tensors, shapes, strict=True):
            if name != wanted or array.shape != shapes[name] or array.dtype != np.float32:
                raise ValueError(f"{name}: not the tensor whose turn it is, {wanted}")
            file.write(np.ascontiguousarray(array, "<f4").data)
