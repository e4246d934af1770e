"""Products with kernels and look-ups in tables, on every mesh: values, gradients, messages."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from esolm_jax.model.linear import Embedding, Linear, ParamSpec, lookup, matmul
from esolm_jax.parallel import sharding

VOCAB, WIDTH = 16, 8
SIZES = ((8, 8), (16, 16))  # rows and tokens of two batches
KERNELS = {  # all kinds there are: axes and shape
    "qkv": (("embed", "heads", None, None), (WIDTH, 4, 3, 2)),
    "attention_out": (("heads", "embed"), (WIDTH, WIDTH)),
    "mlp_in": (("embed", None, "mlp"), (WIDTH, 2, 16)),
    "mlp_out": (("mlp", "embed"), (16, WIDTH)),
    "logits": (("embed", "vocab"), (WIDTH, VOCAB)),
}
TABLE = ("vocab", "embed"), (VOCAB, WIDTH)
MESHES = {
    "one": None,
    "tensor_sequence": (1, 1, 4, 2),
    "data_fsdp_tensor": (2, 2, 2, 1),
    "fsdp_tensor_sequence": (1, 2, 2, 2),
}


def make_mesh(shape):
    if shape is None:
        return None
    return Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), sharding.AXES)


def draw(dtype=np.float32):
    """(tokens, hs, kernels, table) and the gradients of all results: tuples of two batches."""
    rng = np.random.default_rng(0)

    def normal(*shape, dtype=np.float32):
        return rng.normal(size=shape).astype(np.float32).astype(dtype)

    tokens = tuple(rng.integers(0, VOCAB, size).astype(np.int32) for size in SIZES)
    kernels = {name: normal(*shape) for name, (_, shape) in KERNELS.items()}
    hs = {
        name: tuple(normal(*size, kernel.shape[0], dtype=dtype) for size in SIZES)
        for name, kernel in kernels.items()
    }
    out = {
        name: tuple(normal(*size, *kernel.shape[1:], dtype=dtype) for size in SIZES)
        for name, kernel in kernels.items()
    }
    out["table"] = tuple(normal(*size, WIDTH, dtype=dtype) for size in SIZES)
    return tokens, hs, kernels, normal(*TABLE[1]), out


def results_and_gradients(mesh, dtype, tokens, hs, kernels, table, out):
    """Of every kernel and the table, by matmul and lookup."""

    def run(hs, kernels, table):
        found = {
            name: matmul(ParamSpec(KERNELS[name][0], dtype, mesh), hs[name], kernels[name])
            for name in KERNELS
        }
        return found | {"table": lookup(ParamSpec(TABLE[0], dtype, mesh), tokens, table)}

    results, pull = jax.vjp(run, hs, kernels, table)
    return results, pull(out)


def plain(tokens, hs, kernels, table, out):
    """The same in float64 NumPy."""
    as64 = lambda a: np.asarray(a, np.float64)  # noqa: E731
    results, dhs, dkernels = {}, {}, {}
    for name, kernel in kernels.items():
        k = as64(kernel).reshape(len(kernel), -1)
        results[name] = tuple(np.tensordot(as64(h), as64(kernel), 1) for h in hs[name])
        gs = [as64(g).reshape(*g.shape[:2], -1) for g in out[name]]
        dhs[name] = tuple(g @ k.T for g in gs)
        dk = sum(np.einsum("btd,bto->do", as64(h), g) for h, g in zip(hs[name], gs, strict=True))
        dkernels[name] = dk.reshape(kernel.shape)
    results["table"] = tuple(as64(table)[token] for token in tokens)
    dtable = np.zeros(table.shape)
    for token, g in zip(tokens, out["table"], strict=True):
        np.add.at(dtable, token, as64(g))
    return results, (dhs, dkernels, dtable)


def assert_close(found, wanted, tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("name", MESHES)
def test_results_and_gradients_on_every_mesh(name):
    args = draw()
    mesh = make_mesh(MESHES[name])
    found = jax.jit(lambda *args: results_and_gradients(mesh, "float32", *args))(*args)
    assert_close(found, plain(*args), 2e-6)


@pytest.mark.parametrize("name", ["one", "fsdp_tensor_sequence"])
def test_bfloat16_computes_low_and_sums_gradients_high(name):
    """Gradients of parameters are float32 sums of exact products, over the devices too."""
    tokens, hs, kernels, table, out = args = draw(jnp.bfloat16)
    mesh = make_mesh(MESHES[name])
    run = jax.jit(lambda *args: results_and_gradients(mesh, "bfloat16", *args))
    results, (dhs, dkernels, dtable) = run(*args)
    assert {a.dtype for a in jax.tree.leaves((results, dhs))} == {jnp.dtype("bfloat16")}
    assert {a.dtype for a in jax.tree.leaves((dkernels, dtable))} == {jnp.dtype("float32")}
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (kernels, table))
    wanted, (dhs_wanted, *dparams) = plain(tokens, hs, *rounded, out)
    assert_close((dkernels, dtable), tuple(dparams), 2e-6)
    assert_close((results, dhs), (wanted, dhs_wanted), 1.5e-2)


def test_results_in_another_dtype_than_the_products():
    place = ParamSpec(("embed", "vocab"), "bfloat16", None, out_dtype="float32")
    _, hs, kernels, _, _ = draw(jnp.bfloat16)
    found = matmul(place, hs["logits"], kernels["logits"])
    rounded = np.asarray(kernels["logits"].astype(jnp.bfloat16), np.float64)
    assert {y.dtype for y in found} == {jnp.dtype("float32")}
    assert_close(found, tuple(np.asarray(h, np.float64) @ rounded for h in hs["logits"]), 2e-6)


def test_modules_add_a_bias_and_keep_their_parameters():
    def init(key, shape, dtype):
        return jax.random.normal(key, shape, dtype)

    tokens, hs, *_ = draw()
    axes, (width, *wide) = KERNELS["mlp_in"]
    place = ParamSpec(axes, "float32", None)
    linear = Linear(width, tuple(wide), place, nnx.Rngs(0), init=init, bias_init=init)
    kernel, bias = linear.kernel[...], linear.bias[...]
    assert kernel.shape == (width, *wide) and bias.shape == tuple(wide)
    wanted = tuple(np.tensordot(h, kernel, 1) + np.asarray(bias) for h in hs["mlp_in"])
    assert_close(linear(hs["mlp_in"]), wanted, 2e-6)
    bare = Linear(width, tuple(wide), place, nnx.Rngs(0), init=init, bias_init=None)
    assert bare.bias is None
    wanted = tuple(np.tensordot(h, bare.kernel[...], 1) for h in hs["mlp_in"])
    assert_close(bare(hs["mlp_in"]), wanted, 2e-6)
    table = Embedding(VOCAB, width, ParamSpec(TABLE[0], "float32", None), nnx.Rngs(0), init=init)
    found, rows = table(tokens), np.asarray(table.embedding[...])
    jax.tree.map(np.testing.assert_array_equal, found, tuple(rows[token] for token in tokens))


# What is sent.


def messages(text: str):
    """Collectives of optimised HLO: (kind, dtype) of each."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return sorted(re.findall(rf"= \(?(\w+)\[[^=]* ({kinds})(?:-start)?\(", text))


def compiled(name, shape, gradient: bool):
    mesh = make_mesh(shape)
    axes, kernel_shape = KERNELS[name]

    def of(dims, *logical):
        return jax.ShapeDtypeStruct(
            dims, np.float32, sharding=sharding.named_sharding(mesh, *logical)
        )

    def run(hs, kernel):
        return sum(jnp.sum(y * y) for y in matmul(ParamSpec(axes, "float32", mesh), hs, kernel))

    kernel = of(kernel_shape, *axes)
    feature = "mlp" if name == "mlp_out" else None
    hs = tuple(of((*size, kernel_shape[0]), "rows", "tokens", feature) for size in SIZES)
    run = jax.grad(run, 1) if gradient else run
    options = {"out_shardings": kernel.sharding} if gradient else {}
    return messages(jax.jit(run, **options).lower(hs, kernel).compile().as_text())


def test_fsdp_gathers_a_kernel_once_for_two_batches_and_scatters_one_gradient():
    forward = compiled("mlp_in", (1, 8, 1, 1), gradient=False)
    assert [m for m in forward if m[1] != "all-reduce"] == [("f32", "all-gather")]
    backward = compiled("mlp_in", (1, 8, 1, 1), gradient=True)
    kinds = [kind for _, kind in backward]
    assert kinds.count("reduce-scatter") == 1 and kinds.count("all-gather") <= 2
    assert set(kinds) == {"reduce-scatter", "all-gather"}


def test_kernels_are_gathered_in_the_compute_dtype_and_gradients_summed_in_float32():
    mesh = make_mesh((2, 4, 1, 1))
    axes, shape = KERNELS["mlp_in"]
    place = ParamSpec(axes, "bfloat16", mesh)

    def run(hs, kernel):
        return sum(jnp.sum(y.astype(jnp.float32)) for y in matmul(place, hs, kernel))

    hs = tuple(jnp.zeros((*size, WIDTH), jnp.bfloat16) for size in SIZES)
    text = str(jax.make_jaxpr(jax.grad(run, 1))(hs, jnp.zeros(shape)))
    for primitive, dtype in (("all_gather", "bf16"), ("reduce_scatter", "f32"), ("psum", "f32")):
        found = re.findall(rf":(\w+)\[[\d,]*\] = {primitive}", text)
        assert found and set(found) == {dtype}


def test_a_place_says_what_is_split():
    place = ParamSpec(("embed", "vocab"), "float32", make_mesh((2, 4, 1, 1)))
    assert place.gathered == (None, "vocab")
    assert [axis for axis in sharding.AXES if place.splits(axis)] == ["data", "fsdp"]
    assert not ParamSpec(("embed", "vocab"), "float32", None).splits("data")
