"""Lower bounds of a training step: FLOPs from the model's shape, bytes from its sharding.

`compile` compares compiled steps with them; `train` logs its MFU with them.
"""

import math

import jax

from esolm_jax.aot import chips
from esolm_jax.family import registry
from esolm_jax.family.family import Work
from esolm_jax.family.phase import Phase
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.parallel import sharding
from esolm_jax.training import speed
from esolm_jax.training.train_step import Trainer

BACKWARD = 2  # matrix products in the backward pass for each one in the forward pass


def row(config, phase: Phase) -> Work:
    """One row of a phase."""
    work = registry.get(config.objective).work
    return work(phase, config.data.seq_len, config.alpha_0, config.block_length)


def step(config, phases: tuple[Phase, ...]) -> Work:
    """All rows of all phases of one training step."""
    rows = (row(config, phase) * (phase.fraction * config.train.batch_size) for phase in phases)
    return sum(rows, start=Work(0, 0, 0))


def flops(model: ModelConfig, work: Work) -> dict[str, float]:
    """FLOPs of the matrix products of forward and backward pass, by kind; 2 a multiplication."""
    gates = 2 if model.style == "llama" else 1
    heads = model.heads + 2 * model.groups
    out = model.heads * model.head_width
    weights = model.width * (heads * model.head_width + out + (gates + 1) * model.inner)
    products = {
        "blocks": work.tokens * model.blocks * weights,
        "attention": work.pairs * model.blocks * 2 * out,
        "head": work.predicted * model.width * model.vocab_size,
    }
    return {kind: 2 * (1 + BACKWARD) * count for kind, count in products.items()}


def step_cost(training: Trainer) -> speed.StepCost:
    """What turns the time of a training step into rates, on the devices of its mesh."""
    config, built = training.config, training.built
    chip = chips.of_device(built.mesh.devices.flat[0].device_kind)
    return speed.StepCost(
        tokens=config.train.batch_size * config.data.seq_len,
        devices=built.mesh.size,
        flops=sum(flops(built.model, step(config, training.phases)).values()),
        peak_flops=chip.flops if chip else None,
    )


def gather_bytes(size: float, group: int) -> float:
    """Bytes that one chip sends in an all-gather of `size` bytes over a group."""
    return size * (group - 1) / group


def collective_bytes(config, model: ModelConfig, work: Work, mesh, params) -> dict[str, float]:
    """Bytes that one chip must send in a step, by kind, with ring algorithms.

    Every parameter that is split over fsdp is gathered in the compute dtype for the forward and
    again for the backward pass (the embedding and the head once), its float32 gradient is
    scattered back, and summed over the other axes that split the batch; a parameter that is whole
    everywhere has its gradient summed. Activations are summed over `tensor` four times a block,
    once for each embedding and, where a token is predicted, once for the head; keys and values are
    gathered over `sequence` for both passes and their gradients scattered.
    """
    shape = mesh.shape
    compute = jax.numpy.dtype(model.dtype).itemsize
    sent = {"all-gather": 0.0, "reduce-scatter": 0.0, "all-reduce": 0.0}
    micro = config.train.grad_accumulation
    for path, leaf in jax.tree.leaves_with_path(params):
        name = "/".join(key.key for key in path)
        axes = sharding.PARAMETERS[name]
        size = math.prod(leaf.shape)
        if {"heads", "mlp", "vocab"} & set(axes):
            size /= shape["tensor"]
        others = shape["data"] * shape["sequence"]
        if name.endswith("modulation/linear/kernel"):
            continue  # one input vector: its gradient follows from that of the bias
        if "embed" in axes:
            times = 2 if name.startswith("blocks/") else 1
            sent["all-gather"] += micro * times * gather_bytes(size * compute, shape["fsdp"])
            sent["reduce-scatter"] += micro * gather_bytes(size * 4, shape["fsdp"])
            size /= shape["fsdp"]
        else:  # small: its gradient is summed over all rows
            others *= shape["fsdp"]
        sent["all-reduce"] += 2 * gather_bytes(size * 4, others)
    parts = sharding.num_row_shards(mesh) * shape["sequence"]
    local = work.tokens / parts
    embeddings = 2 if model.max_positions else 1
    summed = (4 * model.blocks + embeddings) * local + work.predicted / parts
    summed *= model.width * compute
    sent["all-reduce"] += 2 * gather_bytes(summed, shape["tensor"])
    kv = 2 * model.groups * model.head_width / shape["tensor"]
    whole = model.blocks * local * shape["sequence"] * kv * compute
    sent["all-gather"] += 2 * gather_bytes(whole, shape["sequence"])
    sent["reduce-scatter"] += gather_bytes(whole, shape["sequence"])
    return sent
