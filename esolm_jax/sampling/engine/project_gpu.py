"""A residual sum, the norm behind it, a matrix product and its activation as one GPU kernel
(Pallas, by way of Triton), for few tokens; and a matrix product alone.

A decoding pass of few tokens is as long as its kernels are many. Each program computes some columns
of the product for all tokens. In the same loop it adds up what the norm needs, and in the end it
norms the product, not its input: with x of mean m and deviation s, ((x − m) / s) · W =
(x · W − m · 1 · W) / s. So the weights are loaded before mean and deviation are known.

Where a product without a norm has few columns, several programs share its terms, and the next
kernel adds up their parts where it adds up the residual.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from esolm_jax.sampling.engine.project_gpu_kernels import STEP, Sizes, project_kernel
from esolm_jax.sampling.engine.quantize import Quantized, split
from esolm_jax.sampling.engine.residual import Layer, Residual


def project(
    residual: Residual, layer: Layer, *, dtype=None, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """See project.Projection. `interpret`: run the kernel in Python, on any device."""
    y, *sums = _run(residual, layer, dtype or residual.h.dtype, interpret)
    codes, _ = split(layer.kernel)
    features = codes.shape[2:] if layer.activates else codes.shape[1:]
    y = y.reshape(*residual.h.shape[:2], *features)
    return y, sums[0].reshape(residual.h.shape) if sums else residual.h


def product(x, kernel: jax.Array | Quantized, *, interpret: bool = False) -> jax.Array:
    """The parts of the product, see project.Projection.product."""
    (y,) = _run(Residual(x), Layer(kernel, None, False, None), x.dtype, interpret)
    return y.reshape(len(y), *x.shape[:2], -1)


def _run(residual: Residual, layer: Layer, dtype, interpret: bool):
    """[the product [parts, tokens, columns]; the residual [tokens, D], if it is a sum]"""
    h, activates, norm = residual.h, layer.activates, layer.config
    codes, scale = split(layer.kernel)
    gates = codes.shape[1] if activates else 1
    terms, tokens = len(codes), math.prod(h.shape[:2])
    columns = codes.size // (terms * gates)
    sizes = Sizes(tokens, terms, gates, columns, codes.dtype.itemsize, activates, norm)
    given = {
        "h": (h, (tokens, terms)),
        "added": (residual.added, (-1, tokens, terms)),
        "added_bias": (residual.bias, -1),
        "weights": (codes, (terms, -1)),
        "scale": (scale, -1),
        "bias": (layer.bias, -1),
    }
    named = {name: a.reshape(shape) for name, (a, shape) in given.items() if a is not None}
    dtype = dtype if sizes.parts == 1 else jnp.float32
    shapes = [jax.ShapeDtypeStruct((sizes.parts, tokens, columns), dtype)]
    if residual.added is not None:
        shapes.append(jax.ShapeDtypeStruct((tokens, terms), h.dtype))
    return pl.pallas_call(
        functools.partial(project_kernel, sizes, tuple(named), interpret),
        grid=(sizes.programs, sizes.parts),
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=STEP // 32, num_stages=1),
        interpret=interpret,
        name="decode_project" if norm else "decode_product",
    )(*named.values())
