"""The header of a safetensors file: the offsets of all tensors, checked against the file.

The format: eight bytes of length, JSON of that length, then the tensors without gap or overlap up
to the end of the file.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, BinaryIO

from esolm_jax.files import regular_file
from esolm_jax.interop.shown import shown

MAX_HEADER = 32 * 2**20  # bytes: for about 300,000 tensors
_LENGTH = 8  # bytes of the header's length
_MAX_RANK, _MAX_SIZE = 32, 2**62
METADATA = "__metadata__"
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor: dtype is the name in safetensors; start and stop are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read(file: BinaryIO, size: int, where: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors by name, in the order of the header, and the metadata.

    Args: size: of the file in bytes. where: names it in errors.

    Raises:
      ValueError: a damaged header (the message lacks the file). UserError: not JSON.
    """
    length = int.from_bytes(file.read(_LENGTH), "little")
    if size < _LENGTH or length > size - _LENGTH:
        raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
    if length > MAX_HEADER:
        raise ValueError(f"a header of {length:,} bytes; must have at most {MAX_HEADER:,}")
    text = file.read(length).decode("utf-8")
    header = regular_file.parse_json(text, f"{where}: truncated, or not a safetensors file")
    if not isinstance(header, dict):
        raise ValueError("its header must be an object")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{METADATA} must hold strings")
    entries = {name: _entry(name, value, _LENGTH + length) for name, value in header.items()}
    _check_layout(entries, _LENGTH + length, size)
    return entries, metadata


def _entry(name: str, value: Any, start: int) -> Entry:
    what = shown(name, 100)
    if not isinstance(value, dict):
        raise ValueError(f"tensor {what}: described by {shown(value)}")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"tensor {what}: unknown type {shown(dtype)}")
    if not _are_counts(shape) or len(shape) > _MAX_RANK or math.prod(shape) > _MAX_SIZE:
        raise ValueError(f"tensor {what}: shape must be a list of counts")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {what}: data_offsets must be two counts")
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(
            f"tensor {what}: {offsets[1] - offsets[0]:,} bytes for shape {tuple(shape)} of {dtype}"
        )
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < _MAX_SIZE for n in values)


def _check_layout(entries: Mapping[str, Entry], start: int, size: int) -> None:
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            kind = "a gap before" if entry.start > end else "an overlap at"
            raise ValueError(f"{kind} tensor {shown(name, 100)}")
        end = entry.stop
    if end != size:
        raise ValueError(f"tensors that end at byte {end:,} of {size:,}")
