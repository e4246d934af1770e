"""A residual sum, the norm behind it, a matrix product and its activation as one GPU kernel
(Pallas, by way of Triton), for few tokens.

A decoding pass of few tokens is as long as its kernels are many. Each program computes some columns
of the product for all tokens. In the same loop it adds up what the norm needs, and in the end it
norms the product, not its input: with x of mean m and deviation s, ((x − m) / s) · W =
(x · W − m · 1 · W) / s. So the weights are loaded before mean and deviation are known.

Arrays of a program are [tokens, columns] or [tokens, terms]: all tokens, rounded up to what Triton
multiplies, and some of the D terms at a time.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from esolm_jax.attention.kernel_products import dot, padded
from esolm_jax.model import layers
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.sampling.engine.quantize import split
from esolm_jax.sampling.engine.residual import Layer, Residual

COLUMNS = 32  # of a program: 64 bytes of a row of weights in bfloat16
TILE = 2048  # entries of a tile of tokens
AHEAD = 88 * 1024  # bytes that a program loads ahead, which fit every GPU's shared memory


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of one call: B · W tokens, D terms, columns of each of `gates` products."""

    tokens: int
    terms: int
    gates: int
    columns: int
    activates: bool
    config: ModelConfig

    @property
    def rows(self) -> int:
        return padded(self.tokens)

    @property
    def step(self) -> int:
        """Terms at a time."""
        return min(padded(self.terms), TILE // self.rows)

    def stages(self, itemsize: int) -> int:
        """Of Triton's loop: one computes, the others load."""
        of_tokens = 2 * self.rows * self.step * jnp.dtype(self.config.dtype).itemsize
        tile = self.gates * self.step * COLUMNS * itemsize + of_tokens
        return 1 + min(max(1, AHEAD // tile), -(-self.terms // self.step))


def project(
    residual: Residual, layer: Layer, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """See project.Projection. `interpret`: run the kernel in Python, on any device."""
    h, config = residual.h, layer.config
    codes, scale = split(layer.kernel)
    gates = codes.shape[1] if layer.activates else 1
    terms, tokens = len(codes), math.prod(h.shape[:2])
    sizes = Sizes(tokens, terms, gates, codes.size // (terms * gates), layer.activates, config)
    given = {
        "h": (h, (tokens, terms)),
        "added": (residual.added, (tokens, terms)),
        "added_bias": (residual.bias, -1),
        "weights": (codes, (terms, -1)),
        "scale": (scale, -1),
        "bias": (layer.bias, -1),
    }
    named = {name: a.reshape(shape) for name, (a, shape) in given.items() if a is not None}
    shapes = [jax.ShapeDtypeStruct((tokens, sizes.columns), h.dtype)]
    if residual.added is not None:
        shapes.append(jax.ShapeDtypeStruct((tokens, terms), h.dtype))
    y, *sums = pl.pallas_call(
        functools.partial(project_kernel, sizes, tuple(named)),
        grid=(-(-sizes.columns // COLUMNS),),
        out_shape=shapes,
        compiler_params=triton.CompilerParams(
            num_warps=4, num_stages=sizes.stages(codes.dtype.itemsize)
        ),
        interpret=interpret,
        name="decode_project",
    )(*named.values())
    features = codes.shape[2:] if layer.activates else codes.shape[1:]
    return y.reshape(*h.shape[:2], *features), sums[0].reshape(h.shape) if sums else h


def project_kernel(sizes: Sizes, names: tuple[str, ...], *refs):
    """COLUMNS columns for all tokens; the first program also stores the residual."""
    named, (out, *sums) = dict(zip(names, refs, strict=False)), refs[len(names) :]
    token = jnp.arange(sizes.rows)
    program = pl.program_id(0)
    column = program * COLUMNS + jnp.arange(COLUMNS)
    exists = column < sizes.columns
    ones = jnp.ones((sizes.rows, sizes.step), named["h"].dtype)
    has_mean = sizes.config.style != "llama"  # which norms by the root of the mean square

    def step(i, carry):
        products, squares, of_mean = carry
        term = i * sizes.step + jnp.arange(sizes.step)
        is_term = term < sizes.terms
        there = (token < sizes.tokens)[:, None] & is_term[None]
        x = _residual(named, token, term, there, is_term)
        if sums:
            stores = there & (program == 0)
            triton.store(sums[0].at[token[:, None], term[None]], x, mask=stores)
        weights = [
            triton.load(
                named["weights"].at[term[:, None], (gate * sizes.columns + column)[None]],
                mask=is_term[:, None] & exists[None],
                other=0.0,  # the integer would not compile for float8
            ).astype(x.dtype)
            for gate in range(sizes.gates)
        ]
        wide = x.astype(jnp.float32)
        if has_mean:
            total, *of_weights = of_mean
            ones_by = [y + dot(ones, w, 1, 0) for y, w in zip(of_weights, weights, strict=True)]
            of_mean = [total + wide, *ones_by]
        products = [y + dot(x, w, 1, 0) for y, w in zip(products, weights, strict=True)]
        return products, squares + wide * wide, of_mean

    nothing = [jnp.zeros((sizes.rows, COLUMNS), jnp.float32)] * sizes.gates
    no_terms = jnp.zeros((sizes.rows, sizes.step), jnp.float32)
    start = nothing, no_terms, [no_terms, *nothing] if has_mean else []
    steps = -(-sizes.terms // sizes.step)
    products, squares, of_mean = jax.lax.fori_loop(0, steps, step, start)
    variance = (squares.sum(axis=1) / sizes.terms)[:, None]
    if has_mean:
        mean = (of_mean[0].sum(axis=1) / sizes.terms)[:, None]
        variance = jnp.maximum(variance - mean * mean, 0)
        products = [y - mean * w for y, w in zip(products, of_mean[1:], strict=True)]
    rate = jax.lax.rsqrt(variance + sizes.config.norm_eps)
    parts = [
        _finished(sizes, named, gate, column, exists, y * rate) for gate, y in enumerate(products)
    ]
    y = parts[0]
    if sizes.activates:
        y = layers.activate_parts(sizes.config, [y.astype(jnp.float32) for y in parts])
    mask = (token < sizes.tokens)[:, None] & exists[None]
    triton.store(out.at[token[:, None], column[None]], y.astype(out.dtype), mask=mask)


def _residual(named, token, term, there, is_term):
    """The sum of the residual at these terms, each part rounded as XLA rounds it; 0 for terms that
    do not exist."""
    index = token[:, None], term[None]
    h = triton.load(named["h"].at[index], mask=there, other=0)
    if "added" not in named:
        return h
    added = triton.load(named["added"].at[index], mask=there, other=0)
    if "added_bias" in named:
        bias = triton.load(named["added_bias"].at[term], mask=is_term, other=0)
        added = _add(added, jnp.broadcast_to(bias.astype(h.dtype)[None], h.shape))
    return _add(h, added)


def _add(a, b):
    return (a.astype(jnp.float32) + b.astype(jnp.float32)).astype(a.dtype)


def _finished(sizes: Sizes, named, gate: int, column, exists, y):
    """With scale and bias, rounded as XLA rounds them."""
    at, dtype = gate * sizes.columns + column, named["h"].dtype
    if "scale" in named:
        y = y * triton.load(named["scale"].at[at], mask=exists, other=0)[None]
    y = y.astype(dtype)
    if "bias" not in named:
        return y
    bias = triton.load(named["bias"].at[at], mask=exists, other=0).astype(dtype)
    return _add(y, jnp.broadcast_to(bias[None], y.shape))
