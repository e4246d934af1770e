"""The matrix product of kernels, and the sizes that Triton multiplies."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


def dot(a, b, contract_a: int, contract_b: int, precision=None):
    """Σ over one axis of each, float32."""
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def padded(size: int) -> int:
    """The size, rounded up to what Triton multiplies: powers of two from 16."""
    return max(16, pl.next_power_of_2(size))
