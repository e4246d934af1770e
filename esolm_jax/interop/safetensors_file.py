"""Safetensors files: read and written tensor by tensor."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import BinaryIO

import ml_dtypes
import numpy as np

from esolm_jax import results
from esolm_jax.errors import UserError
from esolm_jax.files import regular_file
from esolm_jax.interop import safetensors_header
from esolm_jax.interop.safetensors_header import Entry

METADATA = "esolm_jax"  # the key of the metadata of our own exports
ALIGNMENT = 64  # bytes, of the data within the file
_NUMPY = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64}
_WRITTEN = {np.dtype(kind).name: name for name, kind in (_NUMPY | {"I8": np.int8}).items()}
STORED = {name: np.dtype(kind) for kind, name in _WRITTEN.items()}  # types that `write` knows


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file. np.asarray(tensor) reads it, if it is of a floating-point type."""

    file: BinaryIO
    where: str
    name: str
    entry: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def type_name(self) -> str:
        """The name of the type in NumPy or, if NumPy lacks it, in safetensors."""
        numpy_type = _NUMPY.get(self.entry.dtype)
        return self.entry.dtype if numpy_type is None else np.dtype(numpy_type).name

    @property
    def nbytes(self) -> int:
        return self.entry.stop - self.entry.start

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        del copy
        content = np.empty(self.nbytes, np.uint8)
        self.file.seek(self.entry.start)
        if self.file.readinto(content.data) != self.nbytes:
            raise UserError(f"{self.where}: truncated during the read of {self.name!a}")
        array = content.view(_NUMPY[self.entry.dtype]).reshape(self.shape)
        return array if dtype is None else array.astype(dtype, copy=False)


def read(path: pathlib.Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors by name, and the metadata of our export ({} for other files).

    Raises UserError: no such file, truncated, or not safetensors.
    """
    where = str(path)
    file = regular_file.open_regular(path)
    try:
        size = os.fstat(file.fileno()).st_size
        entries, metadata = safetensors_header.read(file, size, where)
        about = _about(metadata.get(METADATA, "{}"), where)
    except (OSError, ValueError) as error:
        file.close()
        raise UserError(f"{path}: truncated, or not a safetensors file: {error}") from error
    except UserError:
        file.close()
        raise
    return {name: Tensor(file, where, name, entry) for name, entry in entries.items()}, about


def entries(path: pathlib.Path) -> dict[str, Entry]:
    """Types, shapes and offsets in the file by name. Raises UserError as `read`."""
    return {name: tensor.entry for name, tensor in read(path)[0].items()}


def _about(text: str, where: str) -> dict:
    """The metadata that `write` stored; {} for a file of another program."""
    about = regular_file.parse_json(text, f"{where}: the metadata {METADATA!r}")
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
    dtype: str | Mapping[str, str] = "float32",
) -> None:
    """Writes tensors one at a time to a temporary file, then renames it.

    The safetensors library would need all of them in memory.

    Args:
      shapes: by name.
      tensors: (name, array) in the same order, float32 or of the type of the file; each is dropped
        after it is written.
      about: JSON-able, stored in the metadata.
      dtype: of all tensors, or by name: float32, bfloat16, float16 or int8; float32 tensors are
        rounded to it.
    """
    dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, str) else dtype
    text = _header(shapes, dtypes, about)
    with results.draft_of(path) as draft, open(draft, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, array), wanted in zip(tensors, shapes, strict=True):
            stored = np.dtype(dtypes[wanted])
            is_right = name == wanted and array.shape == shapes[wanted]
            if not is_right or array.dtype not in (np.float32, stored):
                raise ValueError(
                    f"{name}: must be {wanted}, float32 or {stored} of shape {shapes[wanted]}, "
                    "because the header lists it next"
                )
            file.write(np.ascontiguousarray(array.astype(stored, copy=False)).view(np.uint8).data)


def _header(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], about: dict) -> bytes:
    """The JSON at the start of the file, padded so that the data is aligned."""
    header: dict = {"__metadata__": {"format": "pt", METADATA: results.dumps(about)}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + np.dtype(dtypes[name]).itemsize * math.prod(shape)
        header[name] = {
            "dtype": _WRITTEN[dtypes[name]],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    return text + b" " * (-(len(text) + 8) % ALIGNMENT)
