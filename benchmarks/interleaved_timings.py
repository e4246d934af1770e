"""Interleaves the calls to be timed, so that a slow phase of the machine affects all of them."""

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np


def timed(calls: Sequence[Callable], repeats: int) -> tuple[list[float], list]:
    """The median seconds and the last result of each call; calls must be compiled."""
    seconds, results = [[] for _ in calls], [None] * len(calls)
    for _ in range(repeats):
        for i, call in enumerate(calls):
            begin = time.perf_counter()
            results[i] = jax.block_until_ready(call())
            seconds[i].append(time.perf_counter() - begin)
    return [float(np.median(each)) for each in seconds], results
