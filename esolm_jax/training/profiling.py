"""An XLA profile of some training steps, for TensorBoard."""

import pathlib
from collections.abc import Callable

import jax

from esolm_jax.config.checks import step_range
from esolm_jax.training.speed import StepClock

FOLDER = "profile"


class Profile:
    """Traces the steps of config.train.profile_steps into WORKDIR/profile.

    The device finishes the earlier steps before the trace starts, and the traced ones before it
    ends. Other steps are not affected.
    """

    def __init__(
        self,
        steps: str,
        workdir: pathlib.Path,
        *,
        enabled: bool,
        clock: StepClock,
        announce: Callable[[str], None],
    ):
        """`steps`: FIRST:STOP or "". `enabled`: False in processes without output. `clock` stops
        while the trace is started and written."""
        self._steps = step_range(steps) if steps and enabled else range(0)
        self._folder = workdir / FOLDER
        self._clock, self._announce = clock, announce
        self._traced = range(0)  # the steps of the trace under way

    def before(self, step: int, state) -> None:
        """Starts the trace if `step` is the first one to trace. `state` is that before the step."""
        if step not in self._steps:
            return
        if not self._traced:
            jax.block_until_ready(state)
            with self._clock.stopped():
                jax.profiler.start_trace(str(self._folder))
            self._traced = range(step, step)
        self._traced = range(self._traced.start, step + 1)

    def after(self, step: int, state) -> None:
        """Ends the trace if `step` is the last one to trace. `state` is that after the step."""
        if self._traced and step + 1 == self._steps.stop:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends the trace under way, if any: of a run that ends within it, too."""
        if not self._traced:
            return
        first, last = self._traced[0], self._traced[-1]
        self._traced = range(0)
        with self._clock.stopped():
            jax.profiler.stop_trace()
        self._announce(
            f"wrote a profile of steps {first} to {last} to {self._folder}; next: tensorboard "
            f"--logdir={self._folder} (pip install tensorboard xprof)"
        )
