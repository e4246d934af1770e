"""The allowed types of weights: floating-point types of NumPy and ml_dtypes.

Integer tensors are quantized weights or not weights at all; used directly they would make a broken
model without an error.
"""

from collections.abc import Mapping
from typing import Any

from esolm_jax.errors import UserError
from esolm_jax.interop.shown import shown

FLOATS = ("float16", "bfloat16", "float32", "float64")


def name_of(tensor: Any) -> str:
    """The type of a tensor of any reader: its name in NumPy or in the file."""
    return getattr(tensor, "type_name", None) or tensor.dtype.name


def check(tensors: Mapping[str, Any], where: str) -> None:
    """UserError, which names the first tensor, unless all are of floating-point types."""
    wrong = {
        name: name_of(tensor) for name, tensor in tensors.items() if name_of(tensor) not in FLOATS
    }
    if wrong:
        name, kind = next(iter(wrong.items()))
        others = f" ({len(wrong)} of {len(tensors)} tensors)" if len(tensors) > 1 else ""
        raise UserError(
            f"{where}: tensor {shown(name, 200)} is of type {kind}{others}; weights must be "
            f"{', '.join(FLOATS)}"
        )
