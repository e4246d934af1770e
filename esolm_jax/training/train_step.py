"""One training step: label the global batch, sum the phases' losses, update weights and EMA."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import optax

from esolm_jax import config as config_lib
from esolm_jax.family import trim
from esolm_jax.family.labels import LabelledBatch
from esolm_jax.family.phase import Phase, make_phases
from esolm_jax.model import transformer as model_lib
from esolm_jax.model.lm_head import Head, weighted_nll
from esolm_jax.parallel import distributed, sharding
from esolm_jax.process import prng
from esolm_jax.training import health as health_lib
from esolm_jax.training import optimizer as optimizer_lib
from esolm_jax.training.health import Health


@flax.struct.dataclass
class TrainState:
    """The state of training. A step changes all of it but the key (step k uses fold_in(key, k)).

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
    """The sharding of each part of the state; EMA and moments are sharded like their parameters.

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


def label_batch(phases: Sequence[Phase], key, x, valid) -> tuple[LabelledBatch, ...]:
    """Divides the rows of a global batch among the phases, by their fractions, and labels them.

    Noise is drawn for the global batch at once: micro-batches are slices of the result, so their
    summed gradients are those of one large batch.
    """
    labelled, begin = [], 0
    for i, phase in enumerate(phases):
        end = begin + round(phase.fraction * x.shape[0])
        labelled.append(phase.label(jax.random.fold_in(key, i), x[begin:end], valid[begin:end]))
        begin = end
    return tuple(labelled)


@dataclasses.dataclass(frozen=True)
class PhaseLoss:
    """The loss of a step and its gradient.

    Attributes:
      apply: of model.bind. head: the projection on the vocabulary.
      queries: for each phase, how many query copies a row keeps (trim.py), or None: all tokens.
      accumulation: micro-batches. mesh: None = one device.
    """

    apply: Callable
    head: Head
    queries: tuple[int | None, ...]
    accumulation: int = 1
    mesh: jax.sharding.Mesh | None = None

    def losses(self, params, labelled, num_tokens, dropout_key=None):
        """Σ weight · (−log p) / num_tokens of each phase: float32 [phases], in nats per token.

        `num_tokens`: token counts of the phases in the *global* batch, also if `labelled` is a
        micro-batch.
        """
        hidden = self.apply(
            params,
            tuple(part.tokens for part in labelled),
            predict=tuple((0, part.target.shape[1]) for part in labelled),
            head=False,
            dropout_key=dropout_key,
        )
        targets = tuple(part.target for part in labelled)
        weights = tuple(
            part.weight / count for part, count in zip(labelled, num_tokens, strict=True)
        )
        with jax.named_scope("head"):
            return weighted_nll(self.head, hidden, params["logits"], targets, weights)

    def _microbatch_grads(self, params, labelled, num_tokens, dropout_key):
        """(gradient, losses) of one micro-batch; trimmed if every row of it allows that."""

        def loss_fn(params, labelled):
            losses = self.losses(params, labelled, num_tokens, dropout_key)
            return jnp.sum(losses), losses

        grad_fn = jax.grad(loss_fn, has_aux=True)
        pairs = list(zip(labelled, self.queries, strict=True))
        fits = [trim.fits(part, queries) for part, queries in pairs if queries]
        if not fits:
            return grad_fn(params, labelled)
        short = tuple(trim.trim(part, queries) if queries else part for part, queries in pairs)
        with jax.named_scope("trimmed"):
            return jax.lax.cond(
                jnp.all(jnp.stack(fits)),
                lambda: grad_fn(params, short),
                lambda: grad_fn(params, labelled),
            )

    def loss_and_grads(self, params, labelled, dropout_key=None):
        """Phase losses [phases] and the gradient of their sum, in `accumulation` micro-batches.

        Each micro-batch has an equal share of the rows of each phase, sharded over the mesh. The
        activations of one micro-batch are in memory at a time. Gradients are summed in float32.
        """
        num_tokens = [jnp.maximum(jnp.sum(part.num_tokens), 1) for part in labelled]
        if self.accumulation == 1:
            grads, losses = self._microbatch_grads(params, labelled, num_tokens, dropout_key)
            return losses, grads

        def one(carry, micro):
            part, index = micro
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            grads, losses = self._microbatch_grads(params, part, num_tokens, key)
            return jax.tree.map(jnp.add, carry, (losses, grads)), None

        micros = jax.tree.map(
            lambda a: a.reshape(self.accumulation, -1, *a.shape[1:]),
            labelled,
        )
        if self.mesh is not None:
            micros = jax.lax.with_sharding_constraint(micros, sharding.rows(self.mesh, axis=1))
        zeros = (jnp.zeros(len(labelled)), jax.tree.map(jnp.zeros_like, params))
        (losses, grads), _ = jax.lax.scan(one, zeros, (micros, jnp.arange(self.accumulation)))
        return losses, grads


def make_objective(config, built, phases: Sequence[Phase]) -> PhaseLoss:
    """The objective of a training run: `built` is a build.BuiltModel."""
    rows = config.train.batch_size // config.train.grad_accumulation
    length = config.data.seq_len
    multiple = math.lcm(8, built.mesh.shape["sequence"])
    padded = config.data.packing == "pad"  # padding follows the predicted tokens
    queries = [
        trim.num_queries(length, phase.masked_fraction, round(phase.fraction * rows), multiple)
        if phase.can_trim_queries and not padded
        else length
        for phase in phases
    ]
    kept = tuple(n if n < length else None for n in queries)
    return PhaseLoss(built.apply, built.head, kept, config.train.grad_accumulation, built.mesh)


class Trainer:
    """The state and the step of a training run on a mesh.

    Attributes:
      phases, objective, optimizer: the parts of a step.
      shardings: the TrainState of shardings.
    """

    def __init__(self, config, built):
        """`built` is a build.BuiltModel. Raises UserError if the config cannot be trained so."""
        self.config, self.built = config, built
        self.phases = make_phases(config, built.special, low_variance=config.low_variance)
        fractions = {phase.name: phase.fraction for phase in self.phases}
        config_lib.validate_training(config, fractions, sharding.num_row_shards(built.mesh))
        self.objective = make_objective(config, built, self.phases)
        self.optimizer = optimizer_lib.make(config)
        self.shardings = state_shardings(built.mesh, self._make_state, self.optimizer)

    def _make_state(self, params=None) -> TrainState:
        params_key, noise_key = jax.random.split(prng.key(self.config.seed))
        if params is None:
            params = model_lib.init(self.built.model, params_key)
        return init_state(params, self.optimizer, noise_key)

    def init(self, params=None) -> TrainState:
        """A new state, created with its shardings: with given parameters, which are donated, or
        with random ones."""
        make = jax.jit(self._make_state, donate_argnums=0, out_shardings=self.shardings)
        return distributed.together(make)(params)

    def begin(self, state: TrainState, *, skipped: int) -> TrainState:
        """A restored state with `skipped` skipped steps."""

        def make():
            return Health(skipped=jnp.asarray(skipped, jnp.int32))

        return state.replace(health=jax.jit(make, out_shardings=self.shardings.health)())

    def abstract_state(self) -> TrainState:
        """ShapeDtypeStructs of the state, with shardings."""
        return sharding.abstract(self._make_state, self.shardings)

    def abstract_batch(self) -> dict:
        """ShapeDtypeStructs of a global batch."""
        shape = self.config.train.batch_size, self.config.data.seq_len
        rows = sharding.rows(self.built.mesh)
        return {
            "x": jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows),
            "valid": jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=rows),
        }

    def alpha_0_at(self, step):
        """α₀ at a step, float32: from 0 to the config's over train.anneal_steps."""
        share = jnp.minimum(step / self.config.train.anneal_steps, 1)
        return self.config.alpha_0 * share.astype(jnp.float32)

    def _phases_at(self, step) -> tuple[Phase, ...]:
        config = self.config
        if not config.train.anneal_steps:
            return self.phases
        # Query copies are trimmed for the final α₀; until then most batches run untrimmed.
        return make_phases(
            config,
            self.built.special,
            low_variance=config.low_variance,
            alpha_0=self.alpha_0_at(step),
        )

    def step(self, state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        """One update; pure. See step_fn."""
        config, mesh = self.config, self.built.mesh
        key = jax.random.fold_in(prng.wrap(state.key), state.step)
        noise_key, dropout_key = jax.random.split(key)
        with jax.named_scope("label"):
            phases_now = self._phases_at(state.step)
            labelled = label_batch(phases_now, noise_key, batch["x"], batch["valid"])
            labelled = jax.lax.with_sharding_constraint(labelled, sharding.rows(mesh))
        losses, grads = self.objective.loss_and_grads(
            state.params, labelled, dropout_key if config.model.dropout else None
        )
        with jax.named_scope("update"):
            updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = optimizer_lib.update_ema(
                state.ema, params, config.optimizer.ema_decay, state.step + 1
            )
        metrics = {"loss": jnp.sum(losses), "grad_norm": optax.tree.norm(grads)}
        metrics |= {f"loss_{phase.name}": losses[i] for i, phase in enumerate(self.phases)}
        if config.train.anneal_steps:
            metrics["alpha_0"] = self.alpha_0_at(state.step)
        metrics["learning_rate"] = optimizer_lib.last_learning_rate(config, opt_state)
        new = TrainState(state.step + 1, params, ema, opt_state, state.key, state.health)
        return self._undo_if_not_finite(new, state, metrics), metrics

    @jax.named_scope("finite")
    def _undo_if_not_finite(self, new: TrainState, old: TrainState, metrics: dict) -> TrainState:
        """`new`, but with weights, EMA and optimizer state of `old` if the step is not finite, or
        follows a step that ends the run."""
        counts = is_finite = health_lib.is_finite(metrics, new.params)
        if self.config.train.on_non_finite == "stop":
            counts = is_finite & (old.health.first_bad == 0)
        params, ema, opt_state = health_lib.keep(
            counts, (new.params, new.ema, new.opt_state), (old.params, old.ema, old.opt_state)
        )
        health = old.health.after(new.step, counts)
        return TrainState(new.step, params, ema, opt_state, new.key, health)

    def step_fn(self):
        """step(state, batch) → (state, metrics), jitted; the state is donated. All processes must
        call it; the first call synchronizes them.

        batch: {"x": int32 [B, L], "valid": bool [B, L]}, rows split over the mesh. metrics:
        float32 scalars loss (nats per token), one loss per phase, alpha_0 (if it is annealed),
        grad_norm, learning_rate.
        """
        jitted = jax.jit(
            self.step,
            donate_argnums=0,
            in_shardings=(self.shardings, sharding.rows(self.built.mesh)),
            out_shardings=(self.shardings, sharding.replicated(self.built.mesh)),
        )
        return distributed.together(jitted)
