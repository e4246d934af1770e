"""The machine that a benchmark runs on: what it is, what else it does, how fast it multiplies."""

import importlib.metadata
import os
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp


def machine() -> dict:
    """The machine and the versions."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else "cpu",
        "cpu": models[0] if models else platform.processor(),
        "threads": num_threads(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def num_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Load:
    """CPU use of other processes of the machine (Linux)."""

    QUIET = 0.1  # cores

    def __init__(self, patience: float):
        self.patience = patience

    @staticmethod
    def busy() -> float:
        """CPU seconds of the whole machine so far."""
        stat = pathlib.Path("/proc/stat")
        if not stat.exists():
            return float("nan")
        user, nice, system, _, _, irq, softirq, steal = stat.read_text().split()[1:9]
        ticks = sum(map(int, (user, nice, system, irq, softirq, steal)))
        return ticks / os.sysconf("SC_CLK_TCK")

    def wait(self) -> None:
        """Waits until other processes pause, or for the patience."""
        while self.patience > 0:
            busy, begin = self.busy(), time.perf_counter()
            time.sleep(0.5)
            waited = time.perf_counter() - begin
            self.patience -= waited
            if not self.busy() - busy > self.QUIET * waited:
                return

    def during(self, bursts) -> tuple[list[float], float]:
        """The result of bursts(), and the cores that other processes kept busy. bursts() also
        returns the CPU seconds of the published code's process."""
        busy, own, begin = self.busy(), time.process_time(), time.perf_counter()
        taken, published = bursts()
        own = time.process_time() - own + published
        return taken, (self.busy() - busy - own) / (time.perf_counter() - begin)


def matmul_ceiling(side: int, dtype: str, load: Load) -> float:
    """FLOP/s of a product of square matrices: the best of several on a quiet machine."""
    a = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(a, a))
    best = float("inf")
    for _ in range(3):
        load.wait()
        for _ in range(10):
            begin = time.perf_counter()
            jax.block_until_ready(product(a, a))
            best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best


def spread(values) -> dict:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
