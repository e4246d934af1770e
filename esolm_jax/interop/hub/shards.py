"""Weights of a folder of the Hugging Face hub: one safetensors file, or shards and their index."""

import math
import pathlib
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from esolm_jax import results
from esolm_jax.interop import safetensors_file
from esolm_jax.interop.hub import folder as hub_folder

SHARD_BYTES = 5 * 10**9  # by default, of a shard
_HALF = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

Shapes = Mapping[str, tuple[int, ...]]


def split(shapes: Shapes, item_bytes: int, shard_bytes: int) -> list[list[str]]:
    """Names in groups of at most `shard_bytes`; a larger tensor has a group of its own."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = item_bytes * math.prod(shape)
        if groups[-1] and used + size > shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def write(
    folder: pathlib.Path,
    shapes: Shapes,
    read: Callable[[str], np.ndarray],
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes model.safetensors, or shards with their index, one tensor in memory at a time.

    Args:
      shapes: by name, in the order of the files.
      read: name → float32 array.
      dtype: of the files; tensors are rounded to it.

    Returns: the number of files with weights.
    """
    item_bytes = 2 if dtype in _HALF else 4
    groups = split(shapes, item_bytes, shard_bytes)
    files: dict[str, str] = {}
    for i, names in enumerate(groups):
        file = f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        file = hub_folder.FILE if len(groups) == 1 else file
        tensors = ((name, read(name)) for name in names)
        here = {name: shapes[name] for name in names}
        safetensors_file.write(folder / file, here, tensors, {}, dtype)
        files |= dict.fromkeys(names, file)
    if len(groups) > 1:
        total = sum(item_bytes * math.prod(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": files}
        results.write_json(folder / hub_folder.INDEX, index)
    return len(groups)


def exact_dtype(wanted: str, shapes: Shapes, read: Callable[[str], np.ndarray]) -> str:
    """`wanted` if it is bfloat16 or float16 and holds every weight exactly, else float32."""
    if wanted not in _HALF:
        return "float32"

    def is_exact(array: np.ndarray) -> bool:
        with np.errstate(over="ignore"):
            return np.array_equal(array.astype(_HALF[wanted]).astype(np.float32), array)

    return wanted if all(is_exact(read(name)) for name in shapes) else "float32"
