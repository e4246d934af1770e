"""Small checkpoints without a model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from esolm_jax.training import checkpoint, checkpoint_steps
from esolm_jax.training.train_state import TrainState

OPTIMIZER = optax.adamw(1e-3)
META = {"config": {"seed": 1}, "cursor": 5, "tokenizer": {"kind": "bytes"}, "version": "1"}
WRITERS = {"keep_last": 2, "keep_best": 1}


def make_state(step: int, width: int = 3) -> TrainState:
    """A state without a model; everything in it depends on the step."""
    params = {"block": {"kernel": jnp.arange(float(width)) + step, "bias": jnp.full((), step / 7)}}
    return TrainState(
        step=jnp.int32(step),
        params=params,
        ema=jax.tree.map(lambda a: -a, params),
        opt_state=jax.tree.map(lambda a: a + step, OPTIMIZER.init(params)),
        key=jnp.array([step, 9], jnp.uint32),
    )


def shapes(tree):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), tree)


def write(workdir, nelbos: dict[int, float | None], **keep) -> None:
    checkpoints = checkpoint.Checkpoints(workdir, **WRITERS | keep)
    for step, nelbo in nelbos.items():
        checkpoints.save(make_state(step), META | {"cursor": 10 * step}, nelbo=nelbo)
    checkpoints.close()


def steps_in(workdir) -> set[int]:
    return {int(path.name) for path in (workdir / checkpoint_steps.FOLDER).iterdir()}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
