"""Training ends with a checkpoint before a scheduler would kill it (config.train.time_limit)."""

import contextlib
import time
from collections.abc import Iterator

import jax

from esolm_jax.parallel import multihost
from esolm_jax.process import startup

SLOW_DISK = 1e8  # bytes per second: assumed for a checkpoint until one is timed


def seconds_since_start() -> float:
    """Seconds since the start of this process."""
    return time.monotonic() - startup.STARTED_AT


def checkpoint_seconds(timed: float | None, state) -> float:
    """Seconds that a checkpoint takes: `timed`, or a guess from the size of the state."""
    if timed is not None:
        return timed
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / SLOW_DISK


class TimeLimit:
    """Decides after a logging step whether the next one would be too late."""

    def __init__(self, train):
        """`train`: config.train."""
        self._train = train
        self._validation = 0.0  # seconds of the longest validation so far

    @contextlib.contextmanager
    def timing_validation(self) -> Iterator[None]:
        """Around a validation."""
        begin = time.perf_counter()
        yield
        self._validation = max(self._validation, time.perf_counter() - begin)

    def seconds_needed(self, step: int, step_seconds: float, checkpoint: float) -> float:
        """From `step` to the next logging step and a checkpoint there.

        A checkpoint that falls due on the way counts too: the one there waits for it.
        """
        t = self._train
        upcoming = min(step + t.log_every, t.steps)

        def is_due(every: int) -> bool:
            return step // every < upcoming // every

        validates = is_due(t.eval_every) or upcoming == t.steps
        saves = 2 if is_due(t.checkpoint_every) else 1
        return (
            (upcoming - step) * step_seconds
            + (self._validation if validates else 0.0)
            + saves * checkpoint
        )

    def is_reached(self, step: int, step_seconds: float, checkpoint: float) -> bool:
        """Whether training must end at `step`; by the clock of process 0, so all processes agree.

        All processes must call it at the same steps.
        """
        end = seconds_since_start() + self.seconds_needed(step, step_seconds, checkpoint)
        decision = "stop" if end > 60 * self._train.time_limit else "continue"
        return multihost.from_main(decision) == "stop"
