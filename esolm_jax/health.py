"""Training steps that are not finite: undone on the device, noticed by the host when it looks.

The device decides after each step whether it counts, so that no NaN ever reaches the state and the
host need not wait for the device. With train.on_non_finite = "stop", no later step counts either:
the state stays what it was before the first bad one until the host ends the run.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

LIMIT = 2.0**126  # of a parameter: differences of such parameters are still finite
MAX_IN_A_ROW = 100  # skipped steps before the run ends
_WHAT = "the loss, a gradient or a new weight is NaN or infinity"
_ZERO = np.int32(0)


@flax.struct.dataclass
class Health:
    """How steps went, up to now: int32 scalars.

    Attributes:
      first_bad: the first step (from 1) of the current series of steps that were not finite; 0: the
        last one was.
      in_a_row: the length of that series. skipped: how many steps of the run were not finite.
    """

    first_bad: jax.Array = _ZERO
    in_a_row: jax.Array = _ZERO
    skipped: jax.Array = _ZERO

    def after(self, step, is_finite) -> "Health":
        """After one more step, the step-th."""
        first_bad = jnp.where(self.in_a_row == 0, step, self.first_bad)
        return Health(
            first_bad=jnp.where(is_finite, 0, first_bad),
            in_a_row=jnp.where(is_finite, 0, self.in_a_row + 1),
            skipped=self.skipped + jnp.where(is_finite, 0, 1),
        )


def is_finite(metrics: dict, params) -> jax.Array:
    """Whether loss, gradients (by their norm) and new parameters of a step are finite.

    The average of the parameters is, then, too: it lies between them; and so are the moments of
    Adam, which lie between gradients and their squares.
    """
    scalars = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    parts = [jnp.all(jnp.abs(a) < LIMIT) for a in jax.tree.leaves(params)]
    return scalars & jnp.all(jnp.stack(parts))


def keep(counts, new, old):
    """The tree `new` if the step counts, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(counts, a, b), new, old)


def fault(health: Health, config) -> str:
    """Why the run must end, or "". Waits for the device."""
    t = config.train
    first_bad, in_a_row = int(health.first_bad), int(health.in_a_row)
    advice = "lower config.optimizer.learning_rate or lengthen config.optimizer.warmup_steps"
    if t.on_non_finite == "stop" and first_bad:
        advice += ", or go on without such steps: --config.train.on_non_finite=skip"
        return f"step {first_bad}: {_WHAT}; {advice}"
    if in_a_row >= min(MAX_IN_A_ROW, t.steps):
        last = first_bad + in_a_row - 1
        return (
            f"steps {first_bad} to {last}: {_WHAT} in each of them, so all were skipped; {advice}"
        )
    return ""
