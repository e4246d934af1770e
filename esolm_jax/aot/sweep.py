"""Searches meshes, remat policies and micro-batches for the fastest training step of a config."""

import itertools
import math
import re
from collections.abc import Callable, Iterator

from tqdm import tqdm

from esolm_jax.aot import topology
from esolm_jax.aot.chips import GIB
from esolm_jax.errors import UserError
from esolm_jax.model.model_config import REMAT

FSDP, TENSOR = (64, 32, 16, 8, 4, 2, 1), (1, 2, 4)  # sizes that are tried
STATE_BYTES = 16  # of a parameter in float32, its EMA and both moments of AdamW

Measure = Callable[..., dict]


def run(config, name: str, num_slices: int, measure: Measure) -> list[dict]:
    """The figures of every mesh and remat policy on a pod; the best first.

    Each takes the fewest micro-batches (train.grad_accumulation) that fit. Meshes that cannot hold
    the state are left out after the first compilation has counted the parameters.

    Args:
      name, num_slices: the topology.
      measure: (config, name, num_slices) → figures, as compile.measure.
    """
    chip, rows, parameters = topology.parse(name), [], 0
    tried = list(candidates(config, topology.num_chips(name) * num_slices))
    for changes in tqdm(tried, desc="sweep", unit="case"):
        shards = changes["mesh.fsdp"] * changes["mesh.tensor"]
        if parameters * STATE_BYTES / shards > chip.hbm_bytes:
            tqdm.write(f"left out {changes}: parameters, EMA and AdamW do not fit")
            continue
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        try:
            figures = _in_fewest_micro_batches(changed, name, num_slices, measure)
        except UserError as error:
            tqdm.write(f"left out {changes}: {error}")
            continue
        parameters = figures["parameters"]
        rows.append(figures)
    return sorted(rows, key=lambda figures: (not figures["hbm"]["fits"], seconds(figures)))


def candidates(config, chips: int) -> Iterator[dict]:
    """Fields to change: fsdp, from the largest, tensor, and every remat policy."""
    for fsdp, tensor, remat in itertools.product(FSDP, TENSOR, REMAT):
        heads = config.model.kv_heads or config.model.heads
        divides = config.model.width % fsdp == 0 and heads % tensor == 0
        if divides and chips % (fsdp * tensor) == 0:
            yield {
                "mesh.data": -1,
                "mesh.fsdp": fsdp,
                "mesh.tensor": tensor,
                "model.remat": remat,
            }


def _in_fewest_micro_batches(config, name: str, num_slices: int, measure: Measure) -> dict:
    """Figures with the first of 1, 2, 4, … micro-batches that fits; of the last possible number if
    none fits. UserError if the config allows not even one."""
    config.train.grad_accumulation = 1
    figures = measure(config, name, num_slices)
    while not figures["hbm"]["fits"]:
        config.train.grad_accumulation *= 2
        try:
            figures = measure(config, name, num_slices)
        except UserError:  # less than a row for each device
            break
    return figures


def seconds(figures: dict) -> float:
    """Of a step, at least: by its slowest resource, or by all kernels one after another."""
    if "roofline" not in figures:
        return math.inf
    return max(figures["roofline"]["step_seconds"], figures["traffic"]["step_seconds"])


def show(rows: list[dict]) -> None:
    """Prints a table. ms: see seconds(). MFU: at most, of the roofline, and of the sum over kernels
    ("with memory", without the network)."""
    head = f"{'mesh':<32}{'remat':<11}{'parts':>5}{'HBM GiB':>9}{'FLOPs x':>9}{'sent x':>8}"
    print(f"{head}{'ms':>9}{'MFU':>6}{'MFU with memory':>17}")
    for figures in rows:
        mesh = ", ".join(f"{k}={v}" for k, v in figures["mesh"].items() if v > 1) or "one device"
        row = f"{mesh:<32}{figures['remat']:<11}{figures['grad_accumulation']:>5}"
        if "roofline" not in figures:
            needed = re.search(r"[\d.]+[GM]", figures["hbm"]["message"])
            print(f"{row}  does not fit ({needed[0] if needed else '?'})")
            continue
        print(
            f"{row}{figures['hbm']['total'] / GIB:9.2f}{figures['flops']['ratio']:9.2f}"
            f"{figures['collectives']['ratio']:8.2f}{1e3 * seconds(figures):9.1f}"
            f"{figures['roofline']['mfu']:6.0%}{figures['traffic']['mfu']:17.0%}"
            + ("" if figures["hbm"]["fits"] else "  too much")
        )
