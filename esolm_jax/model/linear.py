"""Linear layers and embeddings: compute dtype inside, float32 weights, gradients and reductions.

On a mesh, each is a small manual program (shard_map) whose collectives can be read off it: a
kernel is gathered over `fsdp`, in the compute dtype, where it is used, forward and backward;
its gradient is summed in float32, scattered back over `fsdp`, then summed over what else splits
the batch; activations are summed over `tensor` where the contraction is split. Their gradient
rules are written out, so that none of it is left to be inferred.

Layers take a tuple of arrays, one for each batch of a pass (the phases of an objective), so that a
kernel is gathered once for all of them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from esolm_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """How a kernel [D_in, …] or a table [V, D] computes.

    Attributes:
      axes: logical axes of the parameter's dimensions, as in sharding.PARAMETERS.
      dtype: compute dtype; `out_dtype`: of the result (None = dtype).
      mesh: None = one device.
    """

    axes: tuple[str | None, ...]
    dtype: str
    mesh: Mesh | None
    out_dtype: str | None = None

    @property
    def gathered(self) -> tuple[str | None, ...]:
        """The axes once the parameter is gathered over fsdp."""
        return tuple(None if axis == "embed" else axis for axis in self.axes)

    def gather(self, param):
        """This device's part, in the compute dtype, gathered over fsdp."""
        param = param.astype(self.dtype)
        if self.splits("fsdp") and "embed" in self.axes:
            return jax.lax.all_gather(param, "fsdp", axis=self.axes.index("embed"), tiled=True)
        return param

    def scatter(self, grad):
        """The inverse for its gradient: summed over all that see other tokens."""
        batch = list(sharding.ROWS) + ["sequence"]
        if self.splits("fsdp") and "embed" in self.axes:
            # The parts in front: the TPU compiler makes an all-reduce of what is cut elsewhere.
            at, parts = self.axes.index("embed"), self.mesh.shape["fsdp"]
            split = grad.shape[:at] + (parts, -1) + grad.shape[at + 1 :]
            parts_first = jnp.moveaxis(grad.reshape(split), at, 0)
            grad = jax.lax.psum_scatter(parts_first, "fsdp", scatter_dimension=0)
            batch.remove("fsdp")
        return self.sum_over(batch, grad)

    def sum_over(self, axes, array):
        axes = tuple(axis for axis in axes if self.splits(axis))
        return jax.lax.psum(array, axes) if axes else array

    def splits(self, axis: str) -> bool:
        """Whether there is a mesh, with more than one device along this axis."""
        return self.mesh is not None and self.mesh.shape[axis] > 1

    def run(self, body, in_specs, out_specs, *args):
        """body(*args) on every device's part of the arguments."""
        if self.mesh is None:
            return body(*args)
        return jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,  # gradients are written out, nothing is transposed
        )(*args)


def _tokens(*features: str | None) -> PartitionSpec:
    return sharding.spec("rows", "tokens", *features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def matmul(place: ParamSpec, hs, kernel):
    """h [B, T, D_in] · kernel [D_in, …] → [B, T, …] in the out dtype, for each h of a tuple."""
    return _matmul_forward(place, hs, kernel)[0]


def _matmul_forward(place: ParamSpec, hs, kernel):
    d_in, *d_out = place.gathered
    row_parallel = ["tensor"] if d_in else []  # the contraction is split: partial sums
    out = place.out_dtype or place.dtype

    def body(hs, kernel):
        kernel = place.gather(kernel)
        ys = (
            jnp.tensordot(h.astype(place.dtype), kernel, axes=1, preferred_element_type=out)
            for h in hs
        )
        return tuple(place.sum_over(row_parallel, y) for y in ys)

    specs = _tokens(d_in), sharding.spec(*place.axes)
    return place.run(body, specs, _tokens(*d_out), hs, kernel), (hs, kernel)


def _product(a, b, over: tuple[int, int], dtype):
    """Product of two matrices over axis over[0] of a and over[1] of b."""
    axes = tuple((axis,) for axis in over)
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=dtype)


def _matmul_backward(place: ParamSpec, saved, gs):
    hs, kernel = saved
    d_in, *d_out = place.gathered
    column_parallel = ["tensor"] if any(d_out) else []

    def body(hs, kernel, gs):
        gathered, dtype = place.gather(kernel), place.dtype
        flat_kernel = gathered.reshape(len(gathered), -1)
        dhs, dk = [], jnp.zeros((), jnp.float32)
        for h, g in zip(hs, gs, strict=True):
            # As matrices, and never transposed: XLA's own transposes are slow on a CPU.
            h_low = h.astype(dtype).reshape(-1, h.shape[-1])
            g = g.astype(dtype).reshape(len(h_low), -1)
            dh = _product(g, flat_kernel, (1, 1), dtype).reshape(h.shape)
            dhs.append(place.sum_over(column_parallel, dh).astype(h.dtype))
            dk += _product(h_low, g, (0, 0), jnp.float32)
        return tuple(dhs), place.scatter(dk.reshape(gathered.shape))

    specs = _tokens(d_in), sharding.spec(*place.axes)
    return place.run(body, (*specs, _tokens(*d_out)), specs, hs, kernel, gs)


matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def lookup(place: ParamSpec, tokens, table):
    """Rows of table [V, D] at token int [B, T] → [B, T, D] in the compute dtype, for each of a
    tuple."""
    return _lookup_forward(place, tokens, table)[0]


def _local_ids(place: ParamSpec, token, size: int):
    """Row of this device's part of the table, and whether it is there at all."""
    local = token
    if place.mesh is not None and place.mesh.shape["tensor"] > 1:
        local = token - size * jax.lax.axis_index("tensor")
    return local, (local >= 0) & (local < size)


def _lookup_forward(place: ParamSpec, tokens, table):
    def body(tokens, table):
        table = place.gather(table)
        found = []
        for token in tokens:
            local, here = _local_ids(place, token, len(table))
            rows = jnp.where(here[..., None], table.at[local].get(mode="clip"), 0)
            found.append(place.sum_over(["tensor"], rows))
        return tuple(found)

    specs = _tokens(), sharding.spec(*place.axes)
    return place.run(body, specs, _tokens(None), tokens, table), (tokens, table)


def _lookup_backward(place: ParamSpec, saved, gs):
    tokens, table = saved

    def body(tokens, table, gs):
        size = len(table)
        grad = jnp.zeros((size, gs[0].shape[-1]), jnp.float32)
        for token, g in zip(tokens, gs, strict=True):
            local, here = _local_ids(place, token, size)
            local = jnp.where(here, local, size)  # out of bounds: dropped
            grad = grad.at[local].add(g.astype(jnp.float32), mode="drop")
        return place.scatter(grad)

    axes = sharding.spec(*place.axes)
    return None, place.run(body, (_tokens(), axes, _tokens(None)), axes, tokens, table, gs)


lookup.defvjp(_lookup_forward, _lookup_backward)


class Linear(nnx.Module):
    """Tuple of h [B, T, D_in] → tuple of [B, T, …]: kernel [D_in, …] and, if `bias_init` is given,
    a bias […]."""

    def __init__(
        self, d_in: int, d_out: tuple[int, ...], place: ParamSpec, rngs, *, init, bias_init
    ):
        self.place = place
        self.kernel = nnx.Param(init(rngs.params(), (d_in, *d_out), jnp.float32))
        self.bias = bias_init and nnx.Param(bias_init(rngs.params(), d_out, jnp.float32))

    def __call__(self, hs):
        ys = matmul(self.place, hs, self.kernel[...])
        if self.bias is None:
            return ys
        bias = self.bias[...]
        return tuple(y + bias.astype(y.dtype).reshape(1, 1, *bias.shape) for y in ys)


class Embedding(nnx.Module):
    """Tuple of token ids [B, T] → tuple of [B, T, D]."""

    def __init__(self, vocab_size: int, width: int, place: ParamSpec, rngs, *, init):
        self.place = place
        self.embedding = nnx.Param(init(rngs.params(), (vocab_size, width), jnp.float32))

    def __call__(self, tokens):
        return lookup(self.place, tokens, self.embedding[...])
