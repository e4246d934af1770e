"""Arrays of 8 bits: codes, and one float32 scale for each vector of codes.

Weights have a scale for each output channel, so a product is scaled once, after its sum. The KV
cache has one for each slot and head: scores are scaled by those of the keys, and probabilities by
those of the values. No array of the size of the weights or the cache is made.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # code of each dtype


@flax.struct.dataclass
class Quantized:
    """An array, approximately.

    Attributes:
      codes: int8 or float8_e4m3fn.
      scale: float32, in the shape of `codes` without the axis of the vectors.
    """

    codes: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def size(self) -> int:
        return self.codes.size


Slots = jax.Array | Quantized


def quantize(array: jax.Array, axis: int, dtype) -> Quantized:
    """code · scale, where the largest element of each vector along `axis` has the largest code."""
    exact = array.astype(jnp.float32)
    largest = jnp.max(jnp.abs(exact), axis, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / LARGEST[jnp.dtype(dtype).name]
    codes = exact / scale
    codes = jnp.round(codes) if jnp.issubdtype(dtype, jnp.integer) else codes
    return Quantized(codes.astype(dtype), jnp.squeeze(scale, axis))


def dequantize(quantized: Quantized, axis: int) -> jax.Array:
    """The array: float32."""
    return quantized.codes.astype(jnp.float32) * jnp.expand_dims(quantized.scale, axis)


def split(array: Slots) -> tuple[jax.Array, jax.Array | None]:
    """(codes, scale), or (the array itself, None)."""
    return (array.codes, array.scale) if isinstance(array, Quantized) else (array, None)


def update(old: Slots, new: jax.Array, put: Callable, put_scale: Callable | None = None) -> Slots:
    """put(old, new); of a quantized array each part, with vectors along the last axis of `new`."""
    if not isinstance(old, Quantized):
        return put(old, new)
    part = quantize(new, -1, old.codes.dtype)
    return Quantized(put(old.codes, part.codes), (put_scale or put)(old.scale, part.scale))


def zeros(shape: tuple[int, ...], scale_shape: tuple[int, ...], dtype) -> Slots:
    """Zeros of a dtype; quantized ones if it is one of LARGEST."""
    if jnp.dtype(dtype).name not in LARGEST:
        return jnp.zeros(shape, dtype)
    return Quantized(jnp.zeros(shape, dtype), jnp.zeros(scale_shape, jnp.float32))
