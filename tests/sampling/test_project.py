"""The GPU's kernel for a residual sum, a norm and the product behind it, against XLA's products."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from styles import DIT, LLAMA

from esolm_jax.config import default_config
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine.project import Projection
from esolm_jax.sampling.engine.quantize import quantize
from esolm_jax.sampling.engine.residual import Layer, Residual

pytestmark = pytest.mark.fast_compile  # interpreted kernels are not what users run


def draw(config, *, tokens, terms, features, activates, dtype, mean=0.0, added=True):
    rng = np.random.default_rng(0)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.normal(size=shape), dtype)

    h = normal(1, tokens, terms) + jnp.asarray(mean, dtype)
    residual = Residual(h)
    if added:
        residual = Residual(h, normal(1, tokens, terms), normal(terms, dtype=jnp.float32))
    bias = normal(*features, dtype=jnp.float32) if activates else None
    kernel = (normal(terms, *features) / terms**0.5).astype(dtype)
    return residual, Layer(kernel, bias, activates, dataclasses.replace(config, dtype=dtype))


def both(residual, layer):
    """(the kernel's results, XLA's), float32."""
    results = [
        jax.jit(run)(residual, layer)
        for run in (Projection(None, "gpu", interpret=True), Projection())
    ]
    return jax.tree.map(lambda a: np.asarray(a, np.float32), results)


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize(
    ("config", "features", "activates"),
    [
        (DIT, (3, 4, 16), False),
        (DIT, (1, 200), True),
        (DIT, (1, 2100), True),  # in wider tiles, by up to 2 tokens
        (LLAMA, (2, 4, 8), False),
        (LLAMA, (2, 72), True),
    ],
)
def test_float32_is_exact(config, features, activates, added):
    """More terms than a program takes at a time, not all columns of the last program exist."""
    tokens = 2 if math.prod(features) > 2000 else 3
    sizes = {"tokens": tokens, "terms": 300, "features": features, "activates": activates}
    (y, h), (want_y, want_h) = both(*draw(config, **sizes, dtype="float32", added=added))
    np.testing.assert_allclose(y, want_y, atol=2e-5)
    np.testing.assert_array_equal(h, want_h)


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("tokens", [1, 4])
def test_bfloat16_is_as_exact_as_xla(tokens, mean):
    """The norm is applied to the product: the mean of a token far from 0 costs no accuracy."""
    sizes = {"tokens": tokens, "terms": 96, "features": (1, 64), "activates": True}
    residual, layer = draw(DIT, **sizes, dtype="bfloat16", mean=mean)
    found, plain = both(residual, layer)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), layer.kernel)
    exact = layer.replace(kernel=wide, config=dataclasses.replace(layer.config, dtype="float32"))
    h = residual.sum()
    want, _ = Projection()(Residual(h.astype(jnp.float32)), exact)
    np.testing.assert_array_equal(found[1], plain[1])
    errors = [np.abs(y - np.asarray(want)).max() for y in (found[0], plain[0])]
    assert errors[0] < 1.5 * errors[1] + 1e-3


def test_quantized_weights():
    sizes = {"tokens": 2, "terms": 64, "features": (2, 40), "activates": True}
    residual, layer = draw(LLAMA, **sizes, dtype="float32")
    (y, _), (want, _) = both(residual, layer.replace(kernel=quantize(layer.kernel, 0, "int8")))
    np.testing.assert_allclose(y, want, atol=5e-5)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("terms", "parts"), [(300, 1), (2100, 2)])
def test_product(terms, parts, quantized):
    """Of many terms, the parts of its sum. The next projection adds them to the residual."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 3, terms)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(terms, 96)) / terms**0.5, jnp.float32)
    kernel = quantize(kernel, 0, "int8") if quantized else kernel
    found = jax.jit(Projection(None, "gpu", interpret=True).product)(x, kernel)
    want = jax.jit(Projection().product)(x, kernel)
    assert found.shape == (parts, 1, 3, 96)
    np.testing.assert_allclose(found.sum(axis=0), want, atol=2e-5)
    sizes = {"tokens": 3, "terms": 96, "features": (1, 64), "activates": True}
    residual, layer = draw(DIT, **sizes, dtype="float32")
    (y, h), (want_y, want_h) = both(residual.replace(added=found), layer)
    np.testing.assert_allclose(y, want_y, atol=2e-5)
    np.testing.assert_allclose(h, want_h, atol=1e-6)
    np.testing.assert_allclose(h, residual.replace(added=want).sum(), atol=2e-5)


def test_few_tokens_of_16_bits_alone_take_the_kernel():
    def takes(tokens, dtype, **fields):
        return Projection(None, "gpu", **fields).takes(jnp.zeros((2, tokens, 8), dtype))

    assert takes(1, jnp.bfloat16) and takes(2, jnp.bfloat16)
    assert not takes(3, jnp.bfloat16) and not takes(1, jnp.float32)
    assert not takes(1, jnp.bfloat16, most_tokens=0)
    assert not Projection().takes(jnp.zeros((1, 1, 8), jnp.bfloat16))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    ("features", "activates"), [((2, 4, 8), False), ((2, 72), True)], ids=["heads", "mlp"]
)
def test_on_a_mesh(features, activates, quantized):
    """Rows over data and fsdp, columns over tensor."""
    settings = default_config().mesh
    settings.update({"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1})
    mesh = sharding.make_mesh(settings)
    sizes = {"tokens": 8, "terms": 64, "features": features, "activates": activates}
    residual, layer = draw(LLAMA, **sizes, dtype="float32")
    if quantized:
        layer = layer.replace(kernel=quantize(layer.kernel, 0, "int8"))
    rows = {name: getattr(residual, name).reshape(4, 2, -1) for name in ("h", "added")}
    residual = residual.replace(**rows)
    y, h = jax.jit(Projection(mesh, "gpu", interpret=True))(residual, layer)
    want, want_h = jax.jit(Projection())(residual, layer)
    np.testing.assert_allclose(y, want, atol=5e-5)
    np.testing.assert_array_equal(h, want_h)


@pytest.mark.parametrize("tensor", [1, 2])
def test_product_on_a_mesh(tensor):
    """Rows over data and fsdp; terms that are split over tensor are XLA's."""
    settings = default_config().mesh
    settings.update({"data": 4 // tensor, "fsdp": 2, "tensor": tensor, "sequence": 1})
    mesh = sharding.make_mesh(settings)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 1, 2100)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(2100, 40)) / 46, jnp.float32)
    found = jax.jit(Projection(mesh, "gpu", interpret=True).product)(x, kernel)
    assert found.ndim == (4 if tensor == 1 else 3)
    want = Projection().product(x, kernel)
    total = found.sum(axis=0) if tensor == 1 else found
    np.testing.assert_allclose(total, want, atol=2e-5)
    sizes = {"tokens": 8, "terms": 40, "features": (1, 64), "activates": True}
    residual, layer = draw(DIT, **sizes, dtype="float32")
    residual = Residual(residual.h.reshape(8, 1, 40), found, residual.bias)
    y, h = jax.jit(Projection(mesh, "gpu", interpret=True))(residual, layer)
    want_y, want_h = jax.jit(Projection())(residual, layer)
    np.testing.assert_allclose(y, want_y, atol=5e-5)
    np.testing.assert_allclose(h, want_h, atol=1e-6)
