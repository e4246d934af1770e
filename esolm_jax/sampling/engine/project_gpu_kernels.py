"""The GPU kernel of project_gpu.py: what one program computes.

Its threads multiply and add numbers of their own, in registers: a matrix product would compute
tiles of 16 tokens. A program alone on its core waits for each load that it does not issue together
with others, so what can be loaded is loaded before the first barrier of the threads, which no load
passes.

Operands come by name, because a layer may lack some: `h`, `added`, `added_bias`, `weights`,
`scale`, `bias`. Arrays of a program are [terms], [columns] or [terms, columns]: some of the D terms
at a time.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from esolm_jax.attention.kernel_products import add
from esolm_jax.model import layers
from esolm_jax.model.model_config import ModelConfig

STEP = 256  # terms at a time, and threads of a program
COLUMNS = 32  # of a program: 64 bytes of a row of weights in bfloat16
PROGRAMS = 128  # to keep a large GPU busy
MIN_STEPS = 4  # of a program, where several share the terms
TOGETHER = 48 * 1024  # bytes of weights that the threads of a program load together


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of one call: B · W tokens, D terms, columns of each of `gates` products.

    Attributes:
      itemsize: bytes of a weight.
      norm: the model whose norm the tokens pass, or None = none.
    """

    tokens: int
    terms: int
    gates: int
    columns: int
    itemsize: int
    activates: bool
    norm: ModelConfig | None

    @property
    def has_mean(self) -> bool:
        """Whether the norm subtracts the mean: llama's divides by the root of the mean square."""
        return self.norm is not None and self.norm.style != "llama"

    @property
    def own(self) -> int:
        """Columns of a program, of each product. Half as many where registers or programs would be
        few."""
        is_narrow = self.gates > 1 or self.tokens > 2 or 2 * self.columns < PROGRAMS * COLUMNS
        return COLUMNS // 2 if is_narrow else COLUMNS

    @property
    def programs(self) -> int:
        return -(-self.columns // self.own)

    @property
    def parts(self) -> int:
        """Programs that share the terms of a column; a norm needs all of them."""
        steps = -(-self.terms // STEP)
        return 1 if self.norm else max(1, min(-(-PROGRAMS // self.programs), steps // MIN_STEPS))

    @property
    def steps(self) -> int:
        """Of a program."""
        return -(-self.terms // (STEP * self.parts))

    @property
    def together(self) -> int:
        """Steps whose weights are loaded before the first of them is computed."""
        tile = STEP * self.own * self.gates * self.itemsize
        return min(self.steps, max(1, TOGETHER // tile))


class Sums(NamedTuple):
    """Of a program, over the terms so far; added up over the first axis in the end.

    Attributes:
      products: float32 [STEP, columns] of each token and gate.
      weights: float32 [STEP, columns] of each gate, where the norm has a mean: the products of a
        token of ones.
      squares, tokens: float32 [STEP] of each token, where it is normed.
    """

    products: list[list[jax.Array]]
    weights: list[jax.Array]
    squares: list[jax.Array]
    tokens: list[jax.Array]

    @classmethod
    def empty(cls, sizes: Sizes) -> "Sums":
        tile = [jnp.zeros((STEP, sizes.own), jnp.float32)] * sizes.gates
        of_tokens = [jnp.zeros(STEP, jnp.float32)] * (sizes.tokens if sizes.norm else 0)
        weights = tile if sizes.has_mean else []
        return cls([tile] * sizes.tokens, weights, of_tokens, of_tokens if sizes.has_mean else [])

    def add(self, interpret: bool, xs, weights) -> "Sums":
        """With one more step: [STEP] of each token, [STEP, columns] of each gate, float32."""
        products = [
            [_multiply_add(interpret, x[:, None], w, y) for w, y in zip(weights, ys, strict=True)]
            for x, ys in zip(xs, self.products, strict=True)
        ]
        return Sums(
            products,
            [y + w for y, w in zip(self.weights, weights, strict=False)],
            [y + x * x for y, x in zip(self.squares, xs, strict=False)],
            [y + x for y, x in zip(self.tokens, xs, strict=False)],
        )


def project_kernel(sizes: Sizes, names: tuple[str, ...], interpret: bool, *refs):
    """Some columns and terms for all tokens; the first program also stores the residual."""
    named, (out, *stored) = dict(zip(names, refs, strict=False)), refs[len(names) :]
    program, part = pl.program_id(0), pl.program_id(1)
    column = program * sizes.own + jnp.arange(sizes.own)
    ends = [_load_ends(sizes, named, gate, column) for gate in range(sizes.gates)]
    first = part * sizes.steps * STEP
    last = jnp.minimum(first + sizes.steps * STEP, sizes.terms)

    def load(i):
        term = first + i * STEP + jnp.arange(STEP)
        exists = term < last
        weights = [
            _load_weights(sizes, named, term, exists, gate, column) for gate in range(sizes.gates)
        ]
        parts = [_load_parts(sizes, named, token, term, exists) for token in range(sizes.tokens)]
        return term, exists, weights, parts

    def steps(n, sums):
        together = range(sizes.together)
        for term, exists, weights, parts in [load(n * len(together) + i) for i in together]:
            dtype = named["h"].dtype
            xs = [_residual(*of_token) for of_token in parts]
            for token, x in enumerate(xs if stored else []):
                triton.store(stored[0].at[token, term], x, mask=exists & (program == 0))
            wide = [w.astype(dtype).astype(jnp.float32) for w in weights]
            sums = sums.add(interpret, [x.astype(jnp.float32) for x in xs], wide)
        return sums

    groups = -(-sizes.steps // sizes.together)
    sums = jax.lax.fori_loop(0, groups, steps, Sums.empty(sizes))
    sums = jax.tree.map(lambda a: a.sum(axis=0), sums)
    for token in range(sizes.tokens):
        ys = _normed(sizes, sums, token) if sizes.norm else sums.products[token]
        y = _finished(sizes, ys, ends, out.dtype)
        triton.store(out.at[part, token, column], y, mask=column < sizes.columns)


def _load_weights(sizes: Sizes, named, term, exists, gate: int, column):
    """[terms, columns] of one product, as stored; 0 for what does not exist."""
    return triton.load(
        named["weights"].at[term[:, None], (gate * sizes.columns + column)[None]],
        mask=exists[:, None] & (column < sizes.columns)[None],
        other=jnp.zeros((), named["weights"].dtype),
    )


def _load_parts(sizes: Sizes, named, token: int, term, exists):
    """(h; the parts of what is added; its bias) at these terms, 0 for what does not exist."""

    def load(name, *index):
        return triton.load(named[name].at[*index, term], mask=exists, other=0)

    h, added, bias = load("h", token), [], None
    if "added" in named:
        added = [load("added", part, token) for part in range(named["added"].shape[0])]
    if "added_bias" in named:
        bias = load("added_bias")
    return h, added, bias


def _residual(h, added, bias):
    """The sum of the residual, each part rounded as XLA rounds it."""
    if not added:
        return h
    added = sum(added[1:], added[0]).astype(h.dtype)
    return add(h, added if bias is None else add(added, bias))


def _normed(sizes: Sizes, sums: Sums, token: int):
    """The products of a normed token."""
    products, variance = sums.products[token], sums.squares[token] / sizes.terms
    if sizes.has_mean:
        mean = sums.tokens[token] / sizes.terms
        variance = jnp.maximum(variance - mean * mean, 0)
        products = [y - mean * w for y, w in zip(products, sums.weights, strict=True)]
    rate = jax.lax.rsqrt(variance + sizes.norm.norm_eps)
    return [y * rate for y in products]


def _load_ends(sizes: Sizes, named, gate: int, column) -> dict[str, jax.Array]:
    """Scale and bias of these columns, where the layer has them."""
    at, exists = gate * sizes.columns + column, column < sizes.columns
    return {
        name: triton.load(named[name].at[at], mask=exists, other=0)
        for name in ("scale", "bias")
        if name in named
    }


def _finished(sizes: Sizes, products, ends, dtype):
    """With scale and bias, rounded as XLA rounds them, and the activation."""
    ys = []
    for y, of_gate in zip(products, ends, strict=True):
        y = (y * of_gate["scale"] if "scale" in of_gate else y).astype(dtype)
        ys.append(add(y, of_gate["bias"]) if "bias" in of_gate else y)
    if not sizes.activates:
        return ys[0]
    return layers.activate_parts(sizes.norm, [y.astype(jnp.float32) for y in ys]).astype(dtype)


def _multiply_add(interpret: bool, a, b, c):
    """a · b + c, float32, as one instruction: Triton makes two of it."""
    if interpret:
        return a * b + c
    (y,) = triton.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[jnp.broadcast_to(a, c.shape), jnp.broadcast_to(b, c.shape), c],
        constraints="=r,r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(c.shape, c.dtype)],
    )
    return y
