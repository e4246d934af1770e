"""Files of torch.save (.ckpt, .pt, .bin): a zip of one pickle and one record for each storage.

Tensors are read lazily from a memory map. torch_pickle reads the pickle and executes nothing. A
tensor of a type that NumPy lacks stays an inert Object.
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

from esolm_jax.errors import UserError, brief
from esolm_jax.files import regular_file
from esolm_jax.interop.torch_file import pickle as torch_pickle
from esolm_jax.interop.torch_file.objects import Name, Object

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
_MAX_SIZE = 2**60  # elements of a tensor, counting empty axes as 1
_LOCAL_HEADER = 30  # bytes, then the name and the extra field
_SIGNATURE = b"PK\x03\x04"
_ENCRYPTED, _UTF_8 = 0x1, 0x800  # flags of a record
_ZIP_ERRORS = (OSError, ValueError, EOFError, LookupError, ArithmeticError, NotImplementedError)
_ZIP_ERRORS += (RuntimeError, zipfile.BadZipFile, struct.error)


@dataclasses.dataclass(frozen=True)
class _Storage:
    archive: "Archive"
    key: str
    kind: Name
    size: int  # elements

    @property
    def dtype(self) -> np.dtype | None:
        """None for an unsupported type."""
        numpy_type = DTYPES.get(self.kind.name) if self.kind.module == "torch" else None
        return None if numpy_type is None else np.dtype(numpy_type)


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

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        del copy
        flat = self.storage.archive.read(self.storage)[self.offset :]
        steps = [
            step * self.dtype.itemsize if size > 1 else 0  # size 1: the stride is unused
            for step, size in zip(self.stride, self.shape, strict=True)
        ]
        view = np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)
        return np.array(view, dtype or self.dtype, order="C")


class Archive:
    """An opened file of torch.save.

    Attributes:
      content: the saved object, its tensors as `Tensor`, its dicts as dict.
      where: names the file in errors.
    """

    def __init__(self, path: pathlib.Path):
        """Raises UserError: no such file, not a zip of torch.save, truncated, or hostile."""
        self.where = str(path)
        self._sound: set[str] = set()  # records whose checksum was verified
        try:
            with regular_file.open_regular(path) as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                with zipfile.ZipFile(file) as zipped:
                    records = zipped.infolist()
        except _ZIP_ERRORS as error:
            raise UserError(
                f"{path}: truncated, or not a file of torch.save: {brief(error)}"
            ) from error
        self._records = {info.filename: info for info in records}
        self._begins = self._check_records(records)
        pickles = [name for name in self._records if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise UserError(f"{path}: not a file of torch.save: it has no record NAME/data.pkl")
        self._root = pickles[0].removesuffix("data.pkl")
        order = self._root + "byteorder"
        if order in self._records and bytes(self._record(order)) != sys.byteorder.encode():
            raise UserError(
                f"{path}: its byte order must be {sys.byteorder}-endian, as on this machine"
            )
        self.content = torch_pickle.load(
            bytes(self._record(pickles[0])), self._storage, self._tensors(), self.where
        )

    def _check_records(self, records: list[zipfile.ZipInfo]) -> dict[str, int]:
        """The offset of each record. UserError: records that torch does not write, or overlapping
        records (a zip bomb)."""
        begins, end = {}, 0
        for info in sorted(records, key=lambda info: info.header_offset):
            name = info.filename
            shown = ascii(name[:100])
            if name.startswith("/") or ".." in name.split("/") or "\\" in name:
                raise UserError(f"{self.where}: refused: it holds a record named {shown}")
            if name in begins:
                raise UserError(f"{self.where}: refused: record {shown} is duplicated")
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise UserError(f"{self.where}: not a file of torch.save: a record is compressed")
            if info.flag_bits & _ENCRYPTED:
                raise UserError(f"{self.where}: refused: record {shown} is encrypted")
            header = self._bytes[info.header_offset : info.header_offset + _LOCAL_HEADER]
            if len(header) < _LOCAL_HEADER or not header.startswith(_SIGNATURE):
                raise UserError(f"{self.where}: truncated: record {shown}")
            name_size, extra_size = struct.unpack("<HH", header[26:30])
            begin = info.header_offset + _LOCAL_HEADER
            raw = self._bytes[begin : begin + name_size]
            encoding = "utf-8" if info.flag_bits & _UTF_8 else "cp437"
            if raw != info.orig_filename.encode(encoding, "replace"):
                raise UserError(f"{self.where}: damaged: the name of record {shown}")
            if info.header_offset < end:
                raise UserError(f"{self.where}: refused: record {shown} overlaps another")
            begins[name] = begin + name_size + extra_size
            end = begins[name] + info.file_size
            if end > len(self._bytes):
                raise UserError(f"{self.where}: truncated: record {shown}")
        return begins

    def _record(self, name: str) -> memoryview:
        """The bytes of a record, not copied, its checksum verified."""
        if name not in self._records:
            raise UserError(f"{self.where}: truncated: record {ascii(name[:100])} is missing")
        info, begin = self._records[name], self._begins[name]
        record = memoryview(self._bytes)[begin : begin + info.file_size]
        if name not in self._sound:
            # 0: torch.save wrote no checksums.
            if info.CRC not in (0, zlib.crc32(record)):
                raise UserError(f"{self.where}: damaged: record {ascii(name[:100])}")
            self._sound.add(name)
        return record

    def _storage(self, tag: Any, kind: Any, key: Any, location: Any, size: Any) -> _Storage:
        del location
        is_named = isinstance(key, str) and isinstance(kind, Name)
        if tag != "storage" or not is_named or not _is_count(size):
            raise ValueError("an unknown kind of persistent id")
        return _Storage(self, key, kind, size)

    def _tensors(self) -> dict:
        return {
            "_rebuild_tensor": self._tensor,
            "_rebuild_tensor_v2": self._tensor,
            "_rebuild_tensor_v3": self._tensor_of_new_type,
            "_rebuild_parameter": lambda tensor, *_: tensor,
            "_rebuild_parameter_with_state": lambda tensor, *_: tensor,
        }

    def _tensor_of_new_type(self, *args) -> Object:
        """A tensor of a type without its own storage class: 8-bit floats, unsigned integers.

        `args`: storage, offset, shape, stride, requires_grad, hooks, dtype, metadata.
        """
        dtype = args[6]
        return Object(dtype if isinstance(dtype, Name) else Name("torch", "Tensor"))

    def _tensor(self, storage, offset, shape, stride, *_) -> Tensor | Object:
        if not isinstance(storage, _Storage) or not (
            isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)
        ):
            raise ValueError("a tensor without a storage and a shape")
        if len(shape) > 32 or not all(_is_count(n) for n in (offset, *shape, *stride)):
            raise ValueError("a tensor whose shape is not made of counts")
        if math.prod(n or 1 for n in shape) > _MAX_SIZE:
            raise ValueError(f"a tensor of shape {shape}")
        if storage.dtype is None:
            return Object(storage.kind)
        count = math.prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        # A tensor larger than its storage would exhaust memory from a small file.
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
