"""The matrix product and the sum of kernels, and the sizes that Triton multiplies."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


def dot(a, b, contract_a: int, contract_b: int, precision=None):
    """Σ over one axis of each, float32."""
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def add(a, b):
    """a + b by way of float32, in the dtype of a; b may be of another."""
    return (a.astype(jnp.float32) + b.astype(a.dtype).astype(jnp.float32)).astype(a.dtype)


def padded(size: int) -> int:
    """The size, rounded up to what Triton multiplies: powers of two from 16."""
    return max(16, pl.next_power_of_2(size))
