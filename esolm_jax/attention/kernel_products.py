"""The matrix product of kernels."""

import jax
import jax.numpy as jnp


def dot(a, b, contract_a: int, contract_b: int, precision=None):
    """Σ over one axis of each, float32."""
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )
