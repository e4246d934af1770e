"""One training step: label the global batch, sum the phases' losses, update weights and EMA."""

import jax
import jax.numpy as jnp
import optax

from esolm_jax import config as config_lib
from esolm_jax.family.phase import Phase, make_phases
from esolm_jax.model import transformer as model_lib
from esolm_jax.parallel import multihost, sharding
from esolm_jax.process import prng
from esolm_jax.training import health as health_lib
from esolm_jax.training import optimizer as optimizer_lib
from esolm_jax.training import phase_loss
from esolm_jax.training.health import Health
from esolm_jax.training.train_state import TrainState, init_state, state_shardings

# Of the compiler, on several devices. Without it, a GPU's collectives start where their results are
# needed, and no matrix product runs beside them. The TPU's compiler does so by default.
COMPILER_OPTIONS = {"gpu": {"xla_gpu_enable_latency_hiding_scheduler": True}}


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
        self.objective = phase_loss.make_objective(config, built, self.phases)
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
        return multihost.together(make)(params)

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
            labelled = phase_loss.label_batch(phases_now, noise_key, batch["x"], batch["valid"])
            labelled = jax.lax.with_sharding_constraint(labelled, sharding.rows(mesh))
        losses, grads = self.objective.loss_and_grads(
            state.params, labelled, dropout_key if config.model.dropout else None
        )
        metrics = {"loss": jnp.sum(losses), "grad_norm": optax.tree.norm(grads)}
        metrics |= {f"loss_{phase.name}": losses[i] for i, phase in enumerate(self.phases)}
        if config.train.anneal_steps:
            metrics["alpha_0"] = self.alpha_0_at(state.step)
        new = self._update(state, grads, self._counts(state, metrics))
        metrics["learning_rate"] = optimizer_lib.last_learning_rate(config, new.opt_state)
        return new, metrics

    @jax.named_scope("finite")
    def _counts(self, state: TrainState, metrics: dict):
        """Whether a step may change the state: if it is finite, and follows no step that ends the
        run."""
        counts = health_lib.is_finite(metrics)
        if self.config.train.on_non_finite == "stop":
            counts &= state.health.first_bad == 0
        return counts

    @jax.named_scope("update")
    def _update(self, state: TrainState, grads, counts) -> TrainState:
        """The state after a step. If that does not count, only `step` and `health` differ."""
        o = self.config.optimizer
        updates, opt_state = self.optimizer.update(
            grads, state.opt_state, state.params, counts=counts
        )
        params = optax.apply_updates(state.params, updates)
        # Weights that cannot overflow need no check, and are then read and written once.
        if optimizer_lib.largest_growth(self.config) > health_lib.LIMIT / 2:
            counts &= health_lib.are_bounded(params)
            params, opt_state = health_lib.keep(
                counts, (params, opt_state), (state.params, state.opt_state)
            )
        ema = optimizer_lib.update_ema(state.ema, params, o.ema_decay, state.step + 1, counts)
        health = state.health.after(state.step + 1, counts)
        return TrainState(state.step + 1, params, ema, opt_state, state.key, health)

    def step_fn(self):
        """step(state, batch) → (state, metrics), jitted; the state is donated. All processes must
        call it; the first call synchronizes them.

        batch: {"x": int32 [B, L], "valid": bool [B, L]}, rows split over the mesh. metrics:
        float32 scalars loss (nats per token), one loss per phase, alpha_0 (if it is annealed),
        grad_norm, learning_rate.
        """
        mesh = self.built.mesh
        options = COMPILER_OPTIONS.get(sharding.platform(mesh)) if mesh.size > 1 else None
        jitted = jax.jit(
            self.step,
            compiler_options=options,
            donate_argnums=0,
            in_shardings=(self.shardings, sharding.rows(mesh)),
            out_shardings=(self.shardings, sharding.replicated(mesh)),
        )
        return multihost.together(jitted)
