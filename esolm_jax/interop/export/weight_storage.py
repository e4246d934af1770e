"""The types in which an export stores weights: float32, bfloat16, float16, or int8 codes.

Matrices and tables are rounded; biases, scales and rotation frequencies stay float32. int8 is
symmetric, without activations: one float32 scale for each output channel of a kernel and for each
row of a table, in the tensor NAME_scale.
"""

import pathlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from esolm_jax.interop import safetensors_file, weight_types
from esolm_jax.interop.export.shipped.plain_transformer import BY_ROW, SCALE

DTYPES = ("float32", "bfloat16", "float16", "int8")
_KERNELS = ("qkv", "attention_out", "mlp_in", "mlp_out", "logits")
_LARGEST_CODE = np.float32(127)

Specs = Mapping[str, jax.ShapeDtypeStruct]


def specs(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> Specs:
    """Shapes and dtypes of the stored tensors by name, from the shapes of the float32 ones."""
    stored: dict[str, jax.ShapeDtypeStruct] = {}
    for name, shape in shapes.items():
        is_rounded = _is_rounded(name)
        stored[name] = jax.ShapeDtypeStruct(shape, np.dtype(dtype if is_rounded else "float32"))
        if is_rounded and dtype == "int8":
            of_scale = (shape[0],) if name in BY_ROW else shape[1:]
            stored[f"{name}{SCALE}"] = jax.ShapeDtypeStruct(of_scale, np.dtype("float32"))
    return stored


def _is_rounded(name: str) -> bool:
    return name.rpartition(".")[2] in (*_KERNELS, *BY_ROW)


def cache_dtype(dtype: str) -> str:
    """The type of the KV cache of StableHLO artefacts."""
    return "float32" if dtype == "int8" else dtype


def onnx_cache_dtype(dtype: str) -> str:
    """The type of the KV cache of ONNX artefacts, which widen bfloat16 weights."""
    return "float16" if dtype == "float16" else "float32"


def rewrite(path: pathlib.Path, dtype: str) -> None:
    """Rewrites a float32 file in another type, one tensor in memory at a time.

    Raises UserError: a weight is too large for the type.
    """
    tensors, about = safetensors_file.read(path)
    stored = specs({name: tensor.shape for name, tensor in tensors.items()}, dtype)

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in tensors.items():
            yield from _stored(name, np.asarray(tensor), str(stored[name].dtype))

    safetensors_file.write(
        path,
        {name: spec.shape for name, spec in stored.items()},
        arrays(),
        about,
        {name: str(spec.dtype) for name, spec in stored.items()},
    )


def _stored(name: str, array: np.ndarray, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    if dtype == "int8":
        axis = 1 if name in BY_ROW else 0
        largest = np.abs(array).max(axis=axis, keepdims=True)
        scale = np.where(largest > 0, largest, np.float32(1)) / _LARGEST_CODE
        yield name, np.round(array / scale).astype(np.int8)
        yield f"{name}{SCALE}", scale.squeeze(axis)
        return
    yield name, weight_types.rounded(array, dtype, name)
