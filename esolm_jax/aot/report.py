"""The cost of a compiled step on one chip, compared with its lower bounds."""

import math
import re

import jax

from esolm_jax.aot import hlo, hlo_traffic, lower_bound
from esolm_jax.aot.chips import Chip
from esolm_jax.aot.kernel_flops import USUAL, kernel_flops
from esolm_jax.family import registry, trim
from esolm_jax.family.phase import is_exact
from esolm_jax.parallel import sharding
from esolm_jax.training.train_step import Trainer

KINDS = {
    "head|predicted_chunks|logits": "head",
    "splash|attend": "attention",
    "blocks|while": "blocks",
}


def local_bytes(tree) -> float:
    """Bytes of one chip's shards of ShapeDtypeStructs with shardings."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def _padded(training: Trainer) -> float:
    """Chunks of the head that run in a micro-batch on one chip, on average: half of the last is
    empty."""
    config, objective = training.config, training.objective
    mesh, model = training.built.mesh, training.built.model
    parts = sharding.num_row_shards(mesh) * mesh.shape["sequence"]
    parts *= config.train.grad_accumulation
    lengths = (queries or config.data.seq_len for queries in objective.queries)
    tokens = sum(
        round(phase.fraction * config.train.batch_size) * length
        for phase, length in zip(training.phases, lengths, strict=True)
    )
    head = training.built.head.sized(tokens // parts, model.vocab_size // mesh.shape["tensor"])
    return lower_bound.step(config, training.phases).predicted / parts / head.chunk + 0.5


def _activations(text: str, blocks: int, params: list[tuple[int, ...]]) -> float:
    """Bytes that the forward scan over blocks keeps for the backward pass: arrays in the carry of a
    loop with one entry per block that are not parameters; the maximum over loops. 0 if blocks are
    unrolled: the activations are temporaries like others then."""
    most = 0.0
    for match in re.finditer(r"= \((.*?)\) while\(", text):
        total = 0.0
        for dtype, dims in re.findall(r"([a-z]+\d+)\[([\d,]+)\]", match[1]):
            shape = tuple(int(n) for n in dims.split(","))
            if shape[0] == blocks and shape not in params and math.prod(shape) > 1e5:
                total += hlo.Shape(dtype, shape).bytes
        most = max(most, total)
    return most


def program_memory(compiled, chip: Chip) -> dict:
    """HBM of one chip that a program needs, in bytes, without its code."""
    stats = compiled.memory_analysis()
    output = stats.output_size_in_bytes - stats.alias_size_in_bytes
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes + output
    return {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "total": total,
        "available": chip.hbm_bytes,
        "fits": total <= chip.hbm_bytes,
    }


def memory(training: Trainer, compiled, chip: Chip) -> dict:
    """HBM of one chip, in bytes, by content."""
    stats = compiled.memory_analysis()
    state = training.abstract_state()
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(state.params)]
    activations = _activations(compiled.as_text(), training.built.model.blocks, shapes)
    activations = min(activations, stats.temp_size_in_bytes)
    arguments = stats.argument_size_in_bytes
    output = stats.output_size_in_bytes - stats.alias_size_in_bytes
    total = arguments + stats.temp_size_in_bytes + output + stats.generated_code_size_in_bytes
    return {
        "parameters": local_bytes(state.params),
        "ema": local_bytes(state.ema),
        "optimizer": local_bytes(state.opt_state),
        "activations": activations,
        "temporaries": stats.temp_size_in_bytes - activations,
        "code_and_output": output + stats.generated_code_size_in_bytes,
        "total": total,
        "available": chip.hbm_bytes,
        "fits": total <= chip.hbm_bytes,
    }


def _unknown(training: Trainer, text: str) -> dict:
    """What the text of a compiled training step does not tell, as options of hlo.analyse and
    hlo_traffic.program; the usual branch is the trimmed one."""
    return {
        "trip_counts": {"predicted_chunks": _padded(training)},
        "kernel_flops": kernel_flops(training, text),
        "branches": USUAL,
    }


def traffic(moved: hlo_traffic.Traffic, chip: Chip) -> dict:
    """What a training step launches on one chip, and reads and writes in its memory: operands and
    results of every kernel, as if no cache helped. step_seconds: if its kernels run one after
    another, each as fast as products and memory allow."""
    return {
        "kernels": moved.kernels,
        "bytes": moved.bytes,
        "seconds": moved.bytes / chip.hbm_bandwidth,
        "step_seconds": moved.seconds(chip),
    }


def stray_gathers(training: Trainer, cost_of_step: hlo.Cost) -> list[str]:
    """Collectives outside of loops that gather all blocks of a stacked parameter."""
    blocks = training.built.model.blocks
    wholes = {
        leaf.shape
        for path, leaf in jax.tree.leaves_with_path(training.abstract_state().params)
        if path[0].key == "blocks" and math.prod(leaf.shape) > 1e6
    }
    sizes = {math.prod(shape) for shape in wholes}
    return [
        f"{m.kind} {m.dtype}{list(m.shape)} {m.op_name}"
        for m in cost_of_step.messages
        if blocks in m.shape and math.prod(m.shape) in sizes
    ]


def report(training: Trainer, compiled, chip: Chip) -> dict:
    """All figures of a compiled training step, as JSON-able numbers per chip and step."""
    config, built = training.config, training.built
    text = compiled.as_text()
    unknown = _unknown(training, text)
    cost_of_step = hlo.analyse(text, **unknown, kinds=KINDS)
    work = lower_bound.step(config, training.phases)
    params = training.abstract_state().params
    chips = built.mesh.size
    needed = {k: v / chips for k, v in lower_bound.flops(built.model, work).items()}
    ideal = lower_bound.collective_bytes(config, built.model, work, built.mesh, params)
    sent, best = sum(cost_of_step.collectives.values()), sum(ideal.values())
    flops = {"compiled": cost_of_step.flops, "lower_bound": sum(needed.values())}
    hbm = memory(training, compiled, chip)
    moved = traffic(hlo_traffic.program(text, **unknown), chip)
    return {
        "hbm": hbm,
        "flops": flops
        | {
            "ratio": cost_of_step.flops / flops["lower_bound"],
            "by_kind": dict(cost_of_step.flops_by_kind),
            "lower_bound_by_kind": needed,
            "uncounted_kernels": sorted({k.name for k in cost_of_step.uncounted_kernels}),
        },
        "collectives": {
            "sent": dict(cost_of_step.collectives),
            "ideal": ideal,
            "ratio": sent / best if best else 1.0,
            "stray_gathers": stray_gathers(training, cost_of_step),
        },
        "traffic": moved | {"mfu": flops["lower_bound"] / chip.flops / moved["step_seconds"]},
        "roofline": roofline(cost_of_step.flops, flops["lower_bound"], sent, hbm, chip),
        "tokens_per_step": config.train.batch_size * config.data.seq_len,
        "full_branch_probability": _full_branch(training),
    }


def _full_branch(training: Trainer) -> float:
    """Probability that a micro-batch of a step does not fit the trimmed pass."""
    rows = training.config.train.batch_size // training.config.train.grad_accumulation
    length = training.config.data.seq_len
    misses = [
        trim.exceeded(length, phase.masked_fraction, round(phase.fraction * rows), queries)
        for phase, queries in zip(training.phases, training.objective.queries, strict=True)
        if queries
    ]
    return max(misses, default=0.0)


def roofline(flops: float, needed: float, sent: float, hbm: dict, chip: Chip) -> dict:
    """Seconds of a step if only its slowest resource counted, and the MFU of that.

    Memory traffic is a lower bound: state and activations are read once and written once.
    """
    state = hbm["parameters"] + hbm["ema"] + hbm["optimizer"]
    compute = flops / chip.flops
    memory_seconds = 2 * (state + hbm["activations"]) / chip.hbm_bandwidth
    network = sent / chip.link_bandwidth
    seconds = max(compute, memory_seconds, network)
    return {
        "compute_seconds": compute,
        "memory_seconds": memory_seconds,
        "network_seconds": network,
        "step_seconds": seconds,
        "mfu": needed / chip.flops / seconds,
    }


def objective_name(config) -> str:
    """The objective's description, such as "eso_b, alpha_0 = 0.5"."""
    exact = is_exact(config) or registry.get(config.objective).fixed_alpha_0 is not None
    return config.objective if exact else f"{config.objective}, alpha_0 = {config.alpha_0}"
