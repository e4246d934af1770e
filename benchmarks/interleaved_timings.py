"""Times calls fairly: they take turns, so that what slows the machine for a while slows all."""

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np


def timed(calls: Sequence[Callable], repeats: int) -> tuple[list[float], list]:
    """Of each, already compiled: median seconds until its result is there, and the last result."""
    seconds, results = [[] for _ in calls], [None] * len(calls)
    for _ in range(repeats):
        for i, call in enumerate(calls):
            begin = time.perf_counter()
            results[i] = jax.block_until_ready(call())
            seconds[i].append(time.perf_counter() - begin)
    return [float(np.median(each)) for each in seconds], results
