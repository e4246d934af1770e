"""The cost of the decoding loop that `sample` runs: what one pass launches, reads and writes.

The loop is that of config.sample: its schedule, number of texts and length, without prompts.
"""

import functools
import itertools
import math
import pathlib
import re
import tempfile
import time

import jax
import numpy as np

from esolm_jax.aot import hlo, hlo_traffic, report, topology
from esolm_jax.aot.chips import Chip
from esolm_jax.aot.hlo_parse import Shape
from esolm_jax.model.build import BuiltModel
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine import host_weights
from esolm_jax.sampling.engine import network as network_lib
from esolm_jax.sampling.engine.network import Network
from esolm_jax.sampling.generate import Generator
from esolm_jax.sampling.plan.canvas import Canvas
from esolm_jax.training.train_step import Trainer


def abstract_network(training: Trainer, dtype: str) -> Network:
    """The decoding network of the trainer's model, as shapes on its mesh. `dtype`: of
    config.sample.weight_dtype."""
    built, params = training.built, training.abstract_state().params
    fold = functools.partial(network_lib.fold, built.model, runs_on=built.mesh, dtype=dtype)
    return host_weights.abstract(jax.eval_shape(fold, params), built.mesh)


def generator(config, built: BuiltModel) -> Generator:
    """Generates config.sample's texts, without prompts."""
    s = config.sample
    canvas = Canvas.empty(s.num_texts, s.length or config.data.seq_len)
    return Generator.of(config, canvas, built.special, mesh=built.mesh)


def measure(config, training: Trainer, chip: Chip) -> dict:
    """Compiles the programs of the loop. Figures of one chip; those of a pass are of the program
    whose loop moves most bytes. FLOPs and bytes sent are of one pass and what precedes the loop;
    attention by our kernels is not counted."""
    generates = generator(config, training.built)
    network = abstract_network(training, config.sample.weight_dtype)
    with tempfile.TemporaryDirectory() as dump, topology.compiling_for(training.built.mesh):
        options = {"xla_dump_to": dump} if chip.platform == "gpu" else {}
        begin = time.perf_counter()
        programs = generates.loop.compiled(network, **options)
        seconds = time.perf_counter() - begin
        graphs = _graphs(pathlib.Path(dump))
    filled = mean_filled(generates)
    texts = [program.function.as_text() for program in programs]
    attention = functools.partial(_attention_bytes, filled, config.model.dtype)
    loops = [
        (hlo_traffic.largest_loop(text, {"decode_attention": attention}), text)
        for text in texts
        if " while(" in text
    ]
    one_pass, text_of_loop = max(loops, key=lambda pair: pair[0].bytes)
    cost = hlo.analyse(text_of_loop, trip_counts={"": 1})
    needed = necessary_bytes(network, generates)
    every = [report.program_memory(program.function, chip) for program in programs]
    return {
        "program": "sample",
        "texts": config.sample.num_texts,
        "length": int(generates.plan.order.shape[1]),
        "passes": generates.plan.nfe,
        "blocks": config.model.blocks,
        "programs": len(programs),
        "hbm": max(every, key=lambda hbm: hbm["total"]),
        "flops": cost.flops + sum(map(_product_flops, cost.kernels)),
        "collectives": dict(cost.collectives),
        "kernels_per_pass": one_pass.kernels,
        "conditionals_in_loop": one_pass.conditionals,
        "host_transfers_in_loop": one_pass.host_transfers,
        **graphs,
        "bytes_per_pass": one_pass.bytes,
        "necessary_bytes_per_pass": needed,
        "bytes_ratio": one_pass.bytes / needed,
        "seconds_per_pass_at_least": needed / chip.hbm_bandwidth,
        "dearest_kernels": [
            {"name": kernel.name, "bytes": kernel.bytes}
            for kernel in sorted(one_pass.launches, key=lambda kernel: -kernel.bytes)[:8]
        ],
        "compile_seconds": round(seconds, 1),
        "instructions": sum(text.count(" = ") for text in texts),
    }


def _product_flops(kernel: hlo.Kernel) -> float:
    """Of a pass, of project_gpu.py: each token times all weights, its largest operand."""
    if not re.search("decode_pro(ject|duct)", f"{kernel.name} {kernel.op_name}"):
        return 0.0
    tokens = kernel.operands[0].sizes[0] * kernel.executions
    return 2.0 * tokens * max(operand.elements for operand in kernel.operands)


def mean_filled(generates: Generator) -> float:
    """The mean number of slots of the cache that a token reads, over the passes."""
    plan = generates.plan
    if not plan.reads_cache:
        return 0.0
    if generates.loop.decides_order:
        return plan.order.shape[1] / 2
    return float(np.mean(plan.start[plan.prompt_passes :]))


def necessary_bytes(network: Network, generates: Generator) -> float:
    """Bytes that a pass must read on one chip: all weights but the embedding, of which it needs one
    row a token, and the filled slots of the cache."""

    def local(array) -> float:
        shape = array.sharding.shard_shape(array.shape)
        return math.prod(shape) * array.dtype.itemsize

    of_head = sum(map(local, jax.tree.leaves((network.logits, network.logits_bias))))
    of_head *= network.config.vocab_size / network.logits.shape[1]  # without padding
    weights = sum(map(local, jax.tree.leaves(network.blocks))) + of_head
    model, mesh, plan = network.config, network.embedding.sharding.mesh, generates.plan
    rows = plan.order.shape[0] / sharding.num_row_shards(mesh)
    itemsize = jax.numpy.dtype(model.dtype).itemsize
    widths = float(np.mean(plan.widths[plan.prompt_passes :]))
    embedded = rows * widths * model.width * itemsize
    head = model.head_width * itemsize
    if (cached := generates.loop.task.cache_dtype) != "auto":
        head = model.head_width * jax.numpy.dtype(cached).itemsize + 4  # and its scale
    entry = 2 * model.blocks * model.groups / mesh.shape["tensor"] * head
    return weights + embedded + rows * mean_filled(generates) * entry


def _attention_bytes(filled: float, dtype: str, operands: tuple[Shape, ...]) -> float:
    """Of decode_attention, from the shapes of its operands: of the caches [N, B, S, G·K] and their
    scales [N, B, G, S], the filled slots."""
    from esolm_jax.sampling.engine import decode_gpu, decode_tpu

    itemsize = jax.numpy.dtype(dtype).itemsize
    caches = [shape for shape in operands if len(shape.sizes) == 4]
    slots = caches[0].sizes[2] if caches else 0
    slot_bytes = sum(shape.bytes / math.prod(shape.sizes[:2]) / slots for shape in caches)
    products = [shape.sizes for shape in operands if len(shape.sizes) == 5]
    if products:
        batch, window, groups, heads, width = products[0]
        sizes = decode_gpu.Sizes(batch, groups, heads - 2, window, width, slots)
        return decode_gpu.attention_bytes(sizes, itemsize, slot_bytes, filled)
    rest = sum(shape.stored_bytes for shape in operands if len(shape.sizes) != 4)
    row_bytes = int(caches[0].bytes / math.prod(caches[0].sizes[:3]))
    batch = caches[0].sizes[1]
    return rest + decode_tpu.attention_bytes(batch, slots, row_bytes, slot_bytes, filled)


def _graphs(dump: pathlib.Path) -> dict:
    """Of a GPU's loop: how many CUDA graphs one pass launches, and how many kernels outside of
    them, from what XLA writes about its schedule. {} on other platforms."""
    graphs, outside, most = 0, 0, 0
    for path in dump.glob("*.thunk_sequence_after_thunk_passes.txt"):
        lines = path.read_text().splitlines()
        bodies = [n for n, line in enumerate(lines) if line.strip() == "body:"]
        for start, stop in itertools.pairwise([*bodies, len(lines)]):
            inside = [
                line for line in lines[start + 1 : stop] if _depth(line) > _depth(lines[start])
            ]
            if len(inside) > most:
                most, top = len(inside), min(map(_depth, inside))
                kinds = [line.split(": ")[1] for line in inside if _depth(line) == top]
                graphs = sum(kind.startswith("kCommandBuffer") for kind in kinds)
                outside = len(kinds) - graphs
    return {"graphs_per_pass": graphs, "kernels_outside_graphs": outside} if most else {}


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def show(figures: dict) -> None:
    hbm, gib = figures["hbm"], 2.0**30
    print(
        f"sample: {figures['texts']} texts of {figures['length']} tokens in {figures['passes']} "
        f"passes; {figures['programs']} programs of {figures['instructions']:,} instructions, "
        f"compiled in {figures['compile_seconds']:.0f} s\n"
        f"HBM of one chip: {hbm['arguments'] / gib:.2f} GiB of arguments, "
        f"{hbm['temporaries'] / gib:.2f} of temporaries, {hbm['total'] / gib:.2f} of "
        f"{hbm['available'] / gib:.2f}{'' if hbm['fits'] else ': TOO MUCH'}\n\none pass:\n"
        f"  {'kernels':<20}{figures['kernels_per_pass']:10.0f}\n"
        f"  {'conditionals':<20}{figures['conditionals_in_loop']:10.0f}\n"
        f"  {'host transfers':<20}{figures['host_transfers_in_loop']:10.0f}\n"
        + (
            f"  {'CUDA graphs':<20}{figures['graphs_per_pass']:10}, kernels outside of them "
            f"{figures['kernels_outside_graphs']}\n"
            if "graphs_per_pass" in figures
            else ""
        )
        + f"  {'GFLOPs':<20}{figures['flops'] / 1e9:10.2f}, without attention by our kernels\n"
        f"  {'MB sent':<20}{sum(figures['collectives'].values()) / 1e6:10.2f}\n"
        f"  {'MB moved':<20}{figures['bytes_per_pass'] / 1e6:10.1f}\n"
        f"  {'MB necessary':<20}{figures['necessary_bytes_per_pass'] / 1e6:10.1f}  "
        f"ratio {figures['bytes_ratio']:.2f}\n"
        f"  {'ms at least':<20}{1e3 * figures['seconds_per_pass_at_least']:10.3f}"
    )
