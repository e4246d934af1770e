"""What a training step cannot do without: FLOPs from the model's shape, bytes from its sharding.

The yardsticks that a compiled step is held against (compile.py).
"""

import dataclasses
import math

import jax

from esolm_jax.family.objectives import Phase
from esolm_jax.model.transformer import ModelConfig
from esolm_jax.parallel import sharding

BACKWARD = 2  # every product has two of its size in the backward pass


@dataclasses.dataclass(frozen=True)
class Pass:
    """The expected work of one phase of a step, over all rows.

    Attributes:
      tokens: that must go through the blocks: query copies without a loss need not.
      predicted: that must be projected on the vocabulary.
      pairs: of a query and a key that it may read.
    """

    tokens: float
    predicted: float
    pairs: float

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(
            self.tokens + other.tokens, self.predicted + other.predicted, self.pairs + other.pairs
        )


def row(config, phase: Phase) -> Pass:
    """One row of a phase."""
    length, alpha_0 = config.data.seq_len, config.alpha_0
    predicted = length * phase.predicts
    causal = length * (length + 1) / 2
    match config.objective:
        case "mdlm":
            return Pass(length, predicted, length**2)
        case "bd3":
            return Pass(2 * length, predicted, length * (length + config.block_length))
    others = length * (length - 1) / 2  # pairs of two tokens
    clean = others if config.objective == "eso_a" else 0.0  # where both are, they see each other
    if not phase.droppable:  # ar, and the diffusion phases
        return Pass(length, predicted, causal + clean * alpha_0**2 / 3)  # the mean of α_t²
    queries = predicted * length - others * phase.predicts**2
    return Pass(length + predicted, predicted, causal + clean * alpha_0**2 + queries)


def step(config, phases: tuple[Phase, ...]) -> Pass:
    """All rows of all phases of one training step."""
    total = Pass(0, 0, 0)
    for phase in phases:
        one = row(config, phase)
        rows = phase.fraction * config.train.batch_size
        total += Pass(one.tokens * rows, one.predicted * rows, one.pairs * rows)
    return total


def flops(model: ModelConfig, work: Pass) -> dict[str, float]:
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


def gather_bytes(size: float, group: int) -> float:
    """What one chip sends so that all of a group have an array of `size` bytes, each a part."""
    return size * (group - 1) / group


def collective_bytes(config, model: ModelConfig, work: Pass, mesh, params) -> dict[str, float]:
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
    micro = config.train.accumulation
    for path, leaf in jax.tree.leaves_with_path(params):
        name = "/".join(key.key for key in path)
        axes = sharding.PARAMETERS[name]
        size = math.prod(leaf.shape)
        if {"heads", "mlp", "vocab"} & set(axes):
            size /= shape["tensor"]
        others = shape["data"] * shape["sequence"]
        if name.endswith("modulation/linear/kernel"):
            continue  # one vector comes in: the gradient follows from that of the bias
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
    embeddings = 2 if model.positions else 1
    summed = (4 * model.blocks + embeddings) * local + work.predicted / parts
    summed *= model.width * compute
    sent["all-reduce"] += 2 * gather_bytes(summed, shape["tensor"])
    kv = 2 * model.groups * model.head_width / shape["tensor"]
    whole = model.blocks * local * shape["sequence"] * kv * compute
    sent["all-gather"] += 2 * gather_bytes(whole, shape["sequence"])
    sent["reduce-scatter"] += gather_bytes(whole, shape["sequence"])
    return sent
