"""SIGTERM and SIGINT end training after a step, in all processes."""

import os
import signal

from jax.experimental import multihost_utils

from esolm_jax.parallel import distributed


class StopSignal:
    """SIGTERM or SIGINT to any process ends training in all of them after the same step.

    A second SIGINT (of one process alone: also SIGTERM) ends it immediately. Several processes need
    distributed.start(stoppable=True): JAX's own handler of SIGTERM then tells the others, within
    seconds.
    """

    def __init__(self):
        self._received: int | None = None
        self._many = distributed.is_started() and distributed.process_count() > 1
        for number in (signal.SIGINT,) if self._many else (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        del frame
        self._received = number
        signal.signal(number, signal.SIG_DFL)
        if self._many:
            os.kill(os.getpid(), signal.SIGTERM)

    def after(self, step: int) -> int | None:
        """The signal's number if all processes are to stop after `step`; ask at every step."""
        if not self._many:
            return self._received
        if multihost_utils.reached_preemption_sync_point(step):
            return self._received or signal.SIGTERM
        return None
