"""Functions of plain arrays → StableHLO for CPU, CUDA and TPU in one file, through jax.export."""

from collections.abc import Mapping

import jax
import jax.export
import jax.numpy as jnp

from esolm_jax.interop.export.shipped import plain_transformer
from esolm_jax.interop.export.signatures import Signature

PLATFORMS = ("cpu", "cuda", "tpu")


def functions(network: dict) -> dict:
    """score and step of plain_transformer.py: (weights, …) → arrays. `network`: of
    plain.description."""

    def bind(function):
        return lambda weights, *args: function(weights, network, *args, xp=jnp)

    return {
        "score": bind(plain_transformer.score),
        "step": bind(plain_transformer.step),
    }


def serialize(function, signature: Signature, weights: Mapping[str, jax.ShapeDtypeStruct]) -> bytes:
    """The bytes of the artefact, for jax.export.deserialize(bytes).call(weights, …). The weights
    are an argument, a dict by name, so that the folder stores them once.

    Args:
      weights: shapes and dtypes by name.
    """
    names = [dim for array in signature.inputs for dim in array.shape if isinstance(dim, str)]
    names = sorted(set(names))
    known = ["s >= w"] if "s" in names else []
    dims = dict(
        zip(names, jax.export.symbolic_shape(",".join(names), constraints=known), strict=True)
    )
    specs = [
        jax.ShapeDtypeStruct([dims.get(dim, dim) for dim in array.shape], jnp.dtype(array.dtype))
        for array in signature.inputs
    ]
    # Matmuls in float32, also on hardware with a lower default, so that the parity holds there.
    with jax.default_matmul_precision("highest"):
        export = jax.export.export(jax.jit(function), platforms=PLATFORMS)
        return bytes(export(dict(weights), *specs).serialize())
