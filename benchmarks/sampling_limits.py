"""What a generation cannot do without, and what this machine can do, for benchmarks/sampling.py."""

import concurrent.futures
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import Load, matmul_ceiling, num_threads
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.sampling.plan.passes import DecodePlan

# Bytes: about the weights of the benchmark's network, with the cache of half of 8192 tokens, and
# with that of eight such texts.
WORKING_SETS = 16 * 2**20, 48 * 2**20, 288 * 2**20
MATMUL = 2048
FLOAT = 4  # bytes


def needed(config: ModelConfig, passes: DecodePlan) -> dict:
    """FLOPs and bytes of a pass, the mean over all passes.

    Matrix products only, for the tokens of the windows (not for what they are rounded up to) and
    for logits of what is drawn; every weight is read once, and of the cache what is filled.
    """
    window = (passes.end - passes.start).astype(float)
    block = 4 * config.width**2 + 2 * config.width * config.inner
    head = config.width * config.vocab_size
    flops = 2 * config.blocks * block * window + 2 * head * passes.size
    flops += 4 * config.width * config.blocks * window * (passes.start + window)
    cache = 2 * config.width * config.blocks * passes.start.astype(float)
    weights = config.blocks * block + head
    return {
        "flops_per_pass": float(flops.sum(axis=1).mean()),
        "bytes_per_pass": FLOAT * float(weights + cache.sum(axis=1).mean()),
    }


def measure(load: Load) -> dict:
    """Bytes and FLOPs a second: the best of several, in quiet moments. The working sets are by
    size, as strings, for JSON."""
    return {
        "bytes_per_second": {str(size): _bandwidth(load, size) for size in WORKING_SETS},
        "flops_per_second": matmul_ceiling(MATMUL, "float32", load),
    }


def read_ms(limits: dict, row: dict) -> float:
    """How long this machine takes to read what a pass reads, at the rate of the smallest working
    set that holds it."""
    size = next((n for n in WORKING_SETS if n >= row["bytes_per_pass"]), WORKING_SETS[-1])
    return 1e3 * row["bytes_per_pass"] / limits["bytes_per_second"][str(size)]


def _bandwidth(load: Load, size: int) -> float:
    """Reads of an array again and again: the best of XLA's sum and of NumPy's dot products in as
    many threads as there are cores."""
    array = np.ones(size // FLOAT, np.float32)
    on_device, total = jnp.asarray(array), jax.jit(jnp.sum)
    parts = np.array_split(array, num_threads())
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
        reads = (
            lambda: jax.block_until_ready(total(on_device)),
            lambda: list(pool.map(lambda part: part @ part, parts)),
        )
        best = float("inf")
        for read in reads:
            load.wait()
            for _ in range(100):
                begin = time.perf_counter()
                read()
                best = min(best, time.perf_counter() - begin)
    return size / best
