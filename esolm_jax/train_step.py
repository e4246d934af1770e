"""One training step: label the global batch, sum the phases' losses, update weights and EMA."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import optax

from esolm_jax import optimizer as optimizer_lib
from esolm_jax import sharding
from esolm_jax.labels import Labelled
from esolm_jax.loss import sequence_nll
from esolm_jax.objectives import Phase


@flax.struct.dataclass
class TrainState:
    """All that a step changes, plus the key that it does not (step k draws from fold_in(key, k)).

    Attributes:
      step: int32 scalar, updates done. params, ema: model.init's pytree, float32.
      opt_state: optax state. key: raw uint32 key data, so that a checkpoint holds plain arrays.
    """

    step: jax.Array
    params: dict
    ema: dict
    opt_state: optax.OptState
    key: jax.Array


def init_state(params, optimizer, key) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        key=jax.random.key_data(key),
    )


def label_batch(phases: Sequence[Phase], key, x, valid) -> tuple[Labelled, ...]:
    """Shares the rows of a global batch out among the phases, by their fractions, and labels them.

    Noise is drawn for the global batch at once: micro-batches are slices of the result, so each
    has its own noise and their summed gradients are those of one large batch.
    """
    labelled, begin = [], 0
    for i, phase in enumerate(phases):
        end = begin + round(phase.fraction * x.shape[0])
        labelled.append(phase.label(jax.random.fold_in(key, i), x[begin:end], valid[begin:end]))
        begin = end
    return tuple(labelled)


def phase_losses(apply, params, labelled, num_tokens, mask_id: int, dropout_key=None):
    """Σ weight · (−log p) / num_tokens of each phase: float32 [phases], in nats per token.

    `num_tokens` are the phases' token counts in the *global* batch, whatever part `labelled` is.
    """
    losses = []
    for i, (part, count) in enumerate(zip(labelled, num_tokens, strict=True)):
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
        predict = (0, part.target.shape[1])
        logits, _ = apply(params, part.tokens, predict=predict, dropout_key=key)
        losses.append(jnp.sum(sequence_nll(logits, part, mask_id)) / count)
    return jnp.stack(losses)


def loss_and_grads(
    apply, params, labelled, mask_id: int, *, accumulation=1, dropout_key=None, mesh=None
):
    """Phase losses [phases] and the gradient of their sum, in `accumulation` micro-batches.

    Rows of each phase are cut into `accumulation` equal runs; only one run's activations are alive
    at a time; its rows are split over the `mesh`. Gradients are summed in float32.
    """
    num_tokens = [jnp.maximum(jnp.sum(part.num_tokens), 1) for part in labelled]

    def loss_fn(params, part, key):
        losses = phase_losses(apply, params, part, num_tokens, mask_id, key)
        return jnp.sum(losses), losses

    grad_fn = jax.grad(loss_fn, has_aux=True)
    if accumulation == 1:
        grads, losses = grad_fn(params, labelled, dropout_key)
        return losses, grads

    def one(carry, micro):
        part, index = micro
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        grads, losses = grad_fn(params, part, key)
        return jax.tree.map(jnp.add, carry, (losses, grads)), None

    micros = jax.tree.map(
        lambda a: a.reshape(accumulation, a.shape[0] // accumulation, *a.shape[1:]), labelled
    )
    if mesh is not None:
        micros = jax.lax.with_sharding_constraint(micros, sharding.rows(mesh, axis=1))
    zeros = (jnp.zeros(len(labelled)), jax.tree.map(jnp.zeros_like, params))
    (losses, grads), _ = jax.lax.scan(one, zeros, (micros, jnp.arange(accumulation)))
    return losses, grads


def make_train_step(config, apply, phases: Sequence[Phase], mask_id: int, mesh, optimizer):
    """Returns step(state, batch) → (state, metrics), jitted; the state is donated.

    batch: {"x": int32 [B, L], "valid": bool [B, L]}, rows split over the mesh. metrics: float32
    scalars loss (nats per token), one loss per phase, grad_norm, learning_rate.
    """
    schedule = optimizer_lib.learning_rate(config)
    accumulation = config.train.accumulation

    def step(state: TrainState, batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        noise_key, dropout_key = jax.random.split(key)
        labelled = label_batch(phases, noise_key, batch["x"], batch["valid"])
        labelled = jax.lax.with_sharding_constraint(labelled, sharding.rows(mesh))
        losses, grads = loss_and_grads(
            apply,
            state.params,
            labelled,
            mask_id,
            accumulation=accumulation,
            dropout_key=dropout_key if config.model.dropout else None,
            mesh=mesh,
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optimizer_lib.update_ema(state.ema, params, config.optimizer.ema, state.step + 1)
        metrics = {"loss": jnp.sum(losses)}
        metrics |= {f"loss_{phase.name}": losses[i] for i, phase in enumerate(phases)}
        metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": schedule(state.step)}
        return TrainState(state.step + 1, params, ema, opt_state, state.key), metrics

    whole = sharding.replicated(mesh)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(whole, sharding.rows(mesh)),
        out_shardings=(whole, whole),
    )
