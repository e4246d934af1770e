"""Non-finite training steps: undone on the device, reported when the host polls.

The device decides after each step whether it counts, so the state never holds a NaN and the host
does not wait for the device. With train.on_non_finite = "stop", later steps do not count either:
the state stays as it was before the first non-finite step until the host ends the run.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

LIMIT = 2.0**126  # of a parameter; differences of such parameters stay finite
MAX_IN_A_ROW = 100  # skipped steps before the run ends
_WHAT = "the loss, a gradient or a new weight is NaN or infinity"
_ZERO = np.int32(0)


@flax.struct.dataclass
class Health:
    """Counts of non-finite steps so far: int32 scalars.

    Attributes:
      first_bad: the first step (from 1) of the current series of non-finite steps; 0 if the last
        step was finite.
      in_a_row: the length of that series. skipped: the number of non-finite steps of the run.
    """

    first_bad: jax.Array = _ZERO
    in_a_row: jax.Array = _ZERO
    skipped: jax.Array = _ZERO

    def after(self, step, is_finite) -> "Health":
        """The counts after step `step`."""
        first_bad = jnp.where(self.in_a_row == 0, step, self.first_bad)
        return Health(
            first_bad=jnp.where(is_finite, 0, first_bad),
            in_a_row=jnp.where(is_finite, 0, self.in_a_row + 1),
            skipped=self.skipped + jnp.where(is_finite, 0, 1),
        )


def is_finite(metrics: dict) -> jax.Array:
    """Whether loss and gradients (by their norm) of a step are finite: bool scalar.

    Then its weights, their EMA and Adam's moments are finite, too, if the weights cannot overflow.
    """
    return jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])


def are_bounded(params) -> jax.Array:
    """Whether no parameter is NaN, infinite or about to overflow: bool scalar."""
    return jnp.all(jnp.stack([jnp.all(jnp.abs(a) < LIMIT) for a in jax.tree.leaves(params)]))


def keep(counts, new, old):
    """The tree `new` if the step counts, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(counts, a, b), new, old)


def fault(health: Health, config) -> str:
    """The reason to end the run, or "". Waits for the device."""
    t = config.train
    first_bad, in_a_row = int(health.first_bad), int(health.in_a_row)
    advice = "lower config.optimizer.learning_rate or lengthen config.optimizer.warmup_steps"
    if t.on_non_finite == "stop" and first_bad:
        advice += ", or skip such steps: --config.train.on_non_finite=skip"
        return f"step {first_bad}: {_WHAT}; {advice}"
    if in_a_row >= min(MAX_IN_A_ROW, t.steps):
        last = first_bad + in_a_row - 1
        return f"steps {first_bad} to {last}: all skipped, because {_WHAT}; {advice}"
    return ""
