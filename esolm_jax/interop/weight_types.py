"""The allowed types of weights: floating-point types of NumPy and ml_dtypes.

Integer tensors are quantized weights or not weights at all; used directly they would make a broken
model without an error.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np

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


def rounded(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """The array in float32, bfloat16 or float16. UserError, which names the tensor: a weight is
    too large for the type."""
    with np.errstate(over="ignore"):
        near = array.astype(np.dtype(dtype))
    if dtype != "float32" and not np.isfinite(near.astype(np.float32)).all():
        raise UserError(
            f"--dtype={dtype}: must hold all weights, but one of {name} is "
            f"{np.abs(array).max():.3g}; choose bfloat16"
        )
    return near
