"""Products of the sampler, as loops and as matrix products: held to float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esolm_jax.config import default_config
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine import cpu_kernels

NEAR = {"float32": 3e-6, "bfloat16": 1e-2}  # relative to the largest


def draw(seed, shape, dtype):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_near(found, want, dtype):
    assert found.shape == want.shape
    error = np.abs(np.asarray(found, np.float64) - want).max()
    assert error < NEAR[dtype] * np.abs(want).max()


def as64(array):
    return np.asarray(array).astype(np.float64)


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("together", [1, cpu_kernels.KEY_SLOTS])
@pytest.mark.parametrize("queries", [1, 2, cpu_kernels.FEW_QUERIES, cpu_kernels.FEW_QUERIES + 1])
def test_scores_are_those_with_the_first_keys(queries, together, dtype):
    q, parts = draw(0, (2, 3, queries, 8), dtype), 24 // together
    keys = draw(1, (2, 3, 40, 8), dtype)
    stored = keys.reshape(2, 3, -1, together, 8).swapaxes(3, 4)
    want = np.einsum("bgtk,bgsk->bgts", as64(q), as64(keys[:, :, :24]))
    for run in (cpu_kernels.attention_scores, cpu_kernels._scores):
        found = jax.jit(run, static_argnums=2)(q, stored, parts)
        assert found.dtype == jnp.float32 and found.shape[3:] == (parts, together)
        assert_near(np.asarray(found).reshape(want.shape), want, "float32")


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("n", [1, 12, 16, 40, 2048])
@pytest.mark.parametrize("queries", [2, cpu_kernels.FEW_QUERIES + 1])
def test_the_first_values_are_weighted(queries, n, dtype):
    p, values = draw(0, (2, 3, queries, n), dtype), draw(1, (2, 3, n + 8, 8), dtype)
    want = np.einsum("bgts,bgsk->bgtk", as64(p), as64(values[:, :, :n]))
    for run in (cpu_kernels.weighted_values, cpu_kernels._weighted):
        found = jax.jit(run, static_argnums=2)(p, values, n)
        assert found.dtype == jnp.float32
        assert_near(found, want, "float32")


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("rows", [(1, 1), (1, 2), (2, 1), (1, cpu_kernels.FEW_ROWS), (3, 3)])
@pytest.mark.parametrize(
    "shape", [(256, 4, 3, 64), (1024, 256), (256, 1, 1024), (16, 5000), (40, 8)]
)
def test_a_product_with_a_kernel_is_the_same_for_few_rows(shape, rows, dtype):
    h, kernel = draw(0, (*rows, shape[0]), dtype), draw(1, shape, dtype)
    want = np.tensordot(as64(h), as64(kernel), 1)
    for wanted in (dtype, "float32"):  # the default, and more than it
        found = jax.jit(cpu_kernels.matmul, static_argnums=2)(h, kernel, jnp.dtype(wanted))
        assert found.dtype == wanted
        assert_near(found, want, wanted)
    assert jax.eval_shape(cpu_kernels.matmul, h, kernel).dtype == dtype


def test_few_rows_are_run_as_a_loop():
    """Else the test above would compare the same with the same."""

    def products_of(rows, width=256):
        h, kernel = draw(0, (1, rows, 1024), "float32"), draw(1, (1024, width), "float32")
        text = jax.jit(cpu_kernels.matmul).lower(h, kernel).as_text()
        return text.count(f"1024x{width}xf32>) -> tensor<1x")

    assert products_of(cpu_kernels.FEW_ROWS) == 0 < products_of(cpu_kernels.FEW_ROWS + 1)
    wide = cpu_kernels.TERMS // 1024
    assert (
        products_of(cpu_kernels.FEWER_ROWS, wide)
        == 0
        < products_of(cpu_kernels.FEWER_ROWS + 1, wide)
    )


@pytest.mark.parametrize("axes", [(None, "heads"), ("heads", None)])
def test_a_kernel_that_is_split_over_a_mesh(axes):
    settings = default_config().mesh
    settings.update({"data": 2, "fsdp": 1, "tensor": 4, "sequence": 1})
    where = sharding.named_sharding(sharding.make_mesh(settings), *axes)
    h, kernel = draw(0, (1, 2, 512), "float32"), draw(1, (512, 512), "float32")
    found = jax.jit(cpu_kernels.matmul)(h, jax.device_put(kernel, where))
    assert_near(found, np.tensordot(as64(h), as64(kernel), 1), "float32")


def test_where_keys_lie_follows_the_device():
    class Mesh:
        class devices:
            flat = (type("Device", (), {"platform": "tpu"}),)

    assert cpu_kernels.key_slots(None) == cpu_kernels.KEY_SLOTS and cpu_kernels.key_slots(Mesh) == 1
