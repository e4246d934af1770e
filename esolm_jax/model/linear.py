"""Linear layers and embeddings: compute dtype inside, float32 weights, gradients and reductions.

On a mesh, each layer is a shard_map with explicit collectives. A kernel is gathered over `fsdp` in
the compute dtype, in the forward and in the backward pass. Its gradient is summed in float32,
scattered over `fsdp`, then summed over the other axes that shard the batch. Activations are summed
over `tensor` where the contraction is sharded. The gradient rules are explicit, so the compiler
infers no collective.

Layers take a tuple of arrays, one for each batch of a pass (the phases of an objective), so that a
kernel is gathered once for all of them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from esolm_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """The sharding and dtypes of a kernel [D_in, …] or a table [V, D].

    Attributes:
      axes: logical axes of the parameter's dimensions, as in sharding.PARAMETERS.
      dtype: compute dtype. out_dtype: dtype of the result (None = dtype).
      mesh: None = one device.
    """

    axes: tuple[str | None, ...]
    dtype: str
    mesh: Mesh | None
    out_dtype: str | None = None

    @property
    def gathered(self) -> tuple[str | None, ...]:
        """The axes after the parameter is gathered over fsdp."""
        return tuple(None if axis == "embed" else axis for axis in self.axes)

    def gather(self, param):
        """This device's shard, in the compute dtype, gathered over fsdp."""
        param = param.astype(self.dtype)
        if self.splits("fsdp") and "embed" in self.axes:
            return jax.lax.all_gather(param, "fsdp", axis=self.axes.index("embed"), tiled=True)
        return param

    def scatter(self, grad):
        """The gradient of `gather`: summed over the devices that hold other tokens, and sharded."""
        batch = list(sharding.ROWS) + ["sequence"]
        if self.splits("fsdp") and "embed" in self.axes:
            # Shards on the leading axis: the TPU compiler turns other scatters into all-reduces.
            axis, shards = self.axes.index("embed"), self.mesh.shape["fsdp"]
            split = grad.shape[:axis] + (shards, -1) + grad.shape[axis + 1 :]
            shards_first = jnp.moveaxis(grad.reshape(split), axis, 0)
            grad = jax.lax.psum_scatter(shards_first, "fsdp", scatter_dimension=0)
            batch.remove("fsdp")
        return self.sum_over(batch, grad)

    def sum_over(self, axes, array):
        axes = tuple(axis for axis in axes if self.splits(axis))
        return jax.lax.psum(array, axes) if axes else array

    def splits(self, axis: str) -> bool:
        """Whether there is a mesh, with more than one device along this axis."""
        return self.mesh is not None and self.mesh.shape[axis] > 1

    def run(self, body, in_specs, out_specs, *args):
        """body(*args) on each device's shards of the arguments."""
        if self.mesh is None:
            return body(*args)
        return jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,  # the gradient rules are explicit: nothing is transposed
        )(*args)


def _tokens(*features: str | None) -> PartitionSpec:
    return sharding.spec("rows", "tokens", *features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def matmul(spec: ParamSpec, hs, kernel, cast=None):
    """h [B, T, D_in] · kernel [D_in, …] → [B, T, …] in the out dtype, for each h of a tuple.

    `cast`: the kernel in the compute dtype, if it is at hand; the gradient is that of `kernel`.
    """
    return _matmul_forward(spec, hs, kernel, cast)[0]


def _matmul_forward(spec: ParamSpec, hs, kernel, cast=None):
    kernel = kernel if cast is None else cast
    d_in, *d_out = spec.gathered
    row_parallel = ["tensor"] if d_in else []  # sharded contraction: partial sums
    out = spec.out_dtype or spec.dtype

    def body(hs, kernel):
        kernel = spec.gather(kernel)
        ys = (
            jnp.tensordot(h.astype(spec.dtype), kernel, axes=1, preferred_element_type=out)
            for h in hs
        )
        return tuple(spec.sum_over(row_parallel, y) for y in ys)

    specs = _tokens(d_in), sharding.spec(*spec.axes)
    return spec.run(body, specs, _tokens(*d_out), hs, kernel), (hs, kernel)


def _product(a, b, over: tuple[int, int], dtype):
    """Product of two matrices over axis over[0] of a and over[1] of b."""
    axes = tuple((axis,) for axis in over)
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=dtype)


def _matmul_backward(spec: ParamSpec, saved, gs):
    hs, kernel = saved
    d_in, *d_out = spec.gathered
    column_parallel = ["tensor"] if any(d_out) else []

    def body(hs, kernel, gs):
        gathered, dtype = spec.gather(kernel), spec.dtype
        flat_kernel = gathered.reshape(len(gathered), -1)
        dhs, dk = [], jnp.zeros((), jnp.float32)
        for h, g in zip(hs, gs, strict=True):
            # Matrices without transposes: XLA's transposes are slow on a CPU.
            h_low = h.astype(dtype).reshape(-1, h.shape[-1])
            g = g.astype(dtype).reshape(len(h_low), -1)
            dh = _product(g, flat_kernel, (1, 1), dtype).reshape(h.shape)
            dhs.append(spec.sum_over(column_parallel, dh).astype(h.dtype))
            dk += _product(h_low, g, (0, 0), jnp.float32)
        return tuple(dhs), spec.scatter(dk.reshape(gathered.shape))

    specs = _tokens(d_in), sharding.spec(*spec.axes)
    return *spec.run(body, (*specs, _tokens(*d_out)), specs, hs, kernel, gs), None


matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def lookup(spec: ParamSpec, tokens, table):
    """Rows of table [V, D] at token int [B, T] → [B, T, D] in the compute dtype, for each of a
    tuple."""
    return _lookup_forward(spec, tokens, table)[0]


def _local_ids(spec: ParamSpec, token, size: int):
    """Row of each token in this device's shard of the table, and whether the shard holds it."""
    local = token
    if spec.mesh is not None and spec.mesh.shape["tensor"] > 1:
        local = token - size * jax.lax.axis_index("tensor")
    return local, (local >= 0) & (local < size)


def _lookup_forward(spec: ParamSpec, tokens, table):
    def body(tokens, table):
        table = spec.gather(table)
        rows = []
        for token in tokens:
            local, is_local = _local_ids(spec, token, len(table))
            local_rows = jnp.where(is_local[..., None], table.at[local].get(mode="clip"), 0)
            rows.append(spec.sum_over(["tensor"], local_rows))
        return tuple(rows)

    specs = _tokens(), sharding.spec(*spec.axes)
    return spec.run(body, specs, _tokens(None), tokens, table), (tokens, table)


def _lookup_backward(spec: ParamSpec, saved, gs):
    tokens, table = saved

    def body(tokens, table, gs):
        size = len(table)
        grad = jnp.zeros((size, gs[0].shape[-1]), jnp.float32)
        for token, g in zip(tokens, gs, strict=True):
            local, is_local = _local_ids(spec, token, size)
            local = jnp.where(is_local, local, size)  # out of bounds: dropped
            grad = grad.at[local].add(g.astype(jnp.float32), mode="drop")
        return spec.scatter(grad)

    axes = sharding.spec(*spec.axes)
    return None, spec.run(body, (_tokens(), axes, _tokens(None)), axes, tokens, table, gs)


lookup.defvjp(_lookup_forward, _lookup_backward)


class Linear(nnx.Module):
    """Tuple of h [B, T, D_in] → tuple of [B, T, …]: kernel [D_in, …] and, if `bias_init` is given,
    a bias […].

    `name`: of the products for model.REMAT, or "". The bias is added again in the backward pass:
    keeping its sum would write the products twice.
    """

    def __init__(
        self, d_in: int, d_out: tuple[int, ...], spec: ParamSpec, rngs, *, init, bias_init, name=""
    ):
        self.spec, self.name = spec, name
        self.kernel = nnx.Param(init(rngs.params(), (d_in, *d_out), jnp.float32))
        self.bias = bias_init and nnx.Param(bias_init(rngs.params(), d_out, jnp.float32))

    def __call__(self, hs, cast=None):
        """`cast`: see `matmul`."""
        ys = matmul(self.spec, hs, self.kernel[...], cast)
        if self.name:
            ys = tuple(checkpoint_name(y, self.name) for y in ys)
        if self.bias is None:
            return ys
        bias = self.bias[...]
        return tuple(y + bias.astype(y.dtype).reshape(1, 1, *bias.shape) for y in ys)


class Embedding(nnx.Module):
    """Tuple of token ids [B, T] → tuple of [B, T, D]."""

    def __init__(self, vocab_size: int, width: int, spec: ParamSpec, rngs, *, init):
        self.spec = spec
        self.embedding = nnx.Param(init(rngs.params(), (vocab_size, width), jnp.float32))

    def __call__(self, tokens):
        return lookup(self.spec, tokens, self.embedding[...])
