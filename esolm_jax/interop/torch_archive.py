"""Files of torch.save (.ckpt, .pt, .bin): a zip of one pickle and one record for each storage.

Tensors are read when they are asked for, from a memory map; the pickle is read by torch_pickle,
which runs nothing.
"""

import dataclasses
import math
import mmap
import pathlib
import struct
import sys
import zipfile
import zlib
from typing import Any

import ml_dtypes
import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.interop import torch_pickle

DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_LOCAL_HEADER = 30  # bytes, then the name and the extra field


@dataclasses.dataclass(frozen=True)
class _Storage:
    archive: "Archive"
    key: str
    dtype: np.dtype
    size: int  # elements


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in an archive. np.asarray(tensor) reads it: contiguous, in the dtype of the file.

    Attributes: shape: as in the file; dtype: numpy's, or ml_dtypes.bfloat16.
    """

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        del copy
        flat = self.storage.archive.read(self.storage)[self.offset :]
        steps = [step * self.dtype.itemsize for step in self.stride]
        view = np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)
        return np.array(view, dtype or self.dtype, order="C")


class Archive:
    """An opened file of torch.save.

    Attributes: content: what was saved, its tensors as `Tensor`, its dicts as dict; where: names
      the file in errors.
    """

    def __init__(self, path: pathlib.Path):
        """Raises UserError: no such file, not a zip of torch.save, truncated, or hostile."""
        self.where = str(path)
        self._sound: set[str] = set()  # records whose checksum was verified
        try:
            with open(path, "rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with zipfile.ZipFile(path) as zipped:
                self._records = {info.filename: info for info in zipped.infolist()}
        except (OSError, ValueError, zipfile.BadZipFile, struct.error) as error:
            raise UserError(f"{path}: truncated, or not a file of torch.save: {error}") from error
        for name, info in self._records.items():
            if name.startswith("/") or ".." in name.split("/") or "\\" in name:
                raise UserError(f"{path}: refused: it holds a record named {ascii(name[:100])}")
            if info.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{path}: not a file of torch.save: a record is compressed")
        pickles = [name for name in self._records if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise UserError(f"{path}: not a file of torch.save: it has no record NAME/data.pkl")
        self._root = pickles[0].removesuffix("data.pkl")
        order = self._root + "byteorder"
        if order in self._records and bytes(self._record(order)) != sys.byteorder.encode():
            raise UserError(f"{path}: its numbers have the byte order of another machine")
        self.content = torch_pickle.load(
            bytes(self._record(pickles[0])), self._storage, self._tensors(), self.where
        )

    def _record(self, name: str) -> memoryview:
        """The bytes of a record, not copied, its checksum verified."""
        if name not in self._records:
            raise UserError(f"{self.where}: truncated: record {ascii(name[:100])} is missing")
        info = self._records[name]
        header = self._bytes[info.header_offset : info.header_offset + _LOCAL_HEADER]
        if len(header) < _LOCAL_HEADER:
            raise UserError(f"{self.where}: truncated: record {ascii(name[:100])}")
        lengths = struct.unpack("<HH", header[26:30])
        begin = info.header_offset + _LOCAL_HEADER + sum(lengths)
        record = memoryview(self._bytes)[begin : begin + info.file_size]
        if name not in self._sound:
            # 0: torch was told to write no checksums.
            if len(record) != info.file_size or info.CRC not in (0, zlib.crc32(record)):
                raise UserError(f"{self.where}: damaged: record {ascii(name[:100])}")
            self._sound.add(name)
        return record

    def _storage(self, tag: Any, kind: Any, key: Any, location: Any, size: Any) -> _Storage:
        del location
        dtype = DTYPES.get(getattr(kind, "name", None))
        if tag != "storage" or not isinstance(key, str) or not _is_count(size):
            raise ValueError("an unknown kind of persistent id")
        if dtype is None:
            raise UserError(f"{self.where}: a tensor of type {kind}; allowed: {', '.join(DTYPES)}")
        return _Storage(self, key, np.dtype(dtype), size)

    def _tensors(self) -> dict:
        return {
            "_rebuild_tensor": self._tensor,
            "_rebuild_tensor_v2": self._tensor,
            "_rebuild_parameter": lambda tensor, *_: tensor,
            "_rebuild_parameter_with_state": lambda tensor, *_: tensor,
        }

    def _tensor(self, storage, offset, shape, stride, *_) -> Tensor:
        if not isinstance(storage, _Storage) or not (
            isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)
        ):
            raise ValueError("a tensor without a storage and a shape")
        if len(shape) > 32 or not all(_is_count(n) for n in (offset, *shape, *stride)):
            raise ValueError("a tensor whose shape is not made of counts")
        count = math.prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        # A tensor larger than its storage would fill the memory from a small file.
        if count and (last >= storage.size or count > storage.size):
            raise ValueError(f"a tensor of shape {shape} in a storage of {storage.size}")
        return Tensor(storage, offset, shape, stride)

    def read(self, storage: _Storage) -> np.ndarray:
        """All elements of a storage, read-only, not copied."""
        record = self._record(f"{self._root}data/{storage.key}")
        if len(record) != storage.size * storage.dtype.itemsize:
            raise UserError(f"{self.where}: damaged: storage {ascii(storage.key[:100])}")
        return np.frombuffer(record, storage.dtype)


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < 2**62
