"""The state of training, and the sharding of its parts."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from esolm_jax.parallel import sharding
from esolm_jax.training.health import Health


@flax.struct.dataclass
class TrainState:
    """The values that a step changes, and the constant key (step k draws from fold_in(key, k)).

    Attributes:
      step: int32 scalar, steps done. params, ema: model.init's pytree, float32.
      opt_state: optax state. key: raw uint32 key data, so that a checkpoint holds plain arrays.
      health: not in checkpoints.
    """

    step: jax.Array
    params: dict
    ema: dict
    opt_state: optax.OptState
    key: jax.Array
    health: Health = Health()


def init_state(params, optimizer, key) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        key=jax.random.key_data(key),
    )


def state_shardings(mesh, make_state: Callable, optimizer) -> TrainState:
    """The sharding of each part of the state: EMA and moments like their parameters.

    Raises:
      UserError: a parameter does not divide by the mesh.
    """
    shapes = jax.eval_shape(make_state)
    params = sharding.parameters(mesh, shapes.params)
    whole = sharding.replicated(mesh)
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, where: where,
        shapes.opt_state,
        params,
        transform_non_params=lambda _: whole,
    )
    return TrainState(whole, params, params, opt_state, whole, Health(whole, whole, whole))
