"""What one chip sends in a collective of HLO text."""

import dataclasses
import math
import re

from esolm_jax.hlo_parse import Computation, Instruction, Module, Shape

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array in one collective; a combined collective of several arrays makes several.

    Attributes:
      kind: one of KINDS.
      dtype, shape: the whole array: gathered, or still to be scattered or reduced; of a
        permutation or an all-to-all what one chip holds.
      group: chips that take part together; of a permutation, those that send.
      bytes: what one chip sends in one execution, with ring algorithms: array · (n - 1) / n for
        all-gather, reduce-scatter and all-to-all on n chips, twice that for all-reduce, the array
        for a permutation. Exact for the collective as written; a torus does no better in bytes.
      executions: of one run of the program on one chip.
      loops: op_names of the while loops around it, outermost first.
      op_name: path of jax.named_scope and transformations.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    group: int
    bytes: float
    executions: float
    loops: tuple[str, ...]
    op_name: str

    @property
    def in_loop(self) -> bool:
        return bool(self.loops)


def started_channels(module: Module) -> set[str]:
    """Channels of collectives that the TPU compiler runs beside other fusions.

    It repeats such a collective in the fusion that starts it, in those that it runs beside and in
    the one that ends it, always with the same channel.
    """
    return {
        i.attribute("channel_id")
        for c in module.computations.values()
        if _starts(c)
        for i in c.instructions.values()
        if i.attribute("channel_id")
    }


def _starts(computation: Computation) -> bool:
    return 'custom_call_target="AsyncCollectiveStart"' in computation.root.attributes


def collectives(
    instruction: Instruction, computation: Computation, module: Module, started: set[str]
) -> list[Collective]:
    """The arrays of one collective, executed once; [] for any other instruction.

    An asynchronous pair counts where it starts. `started`: of started_channels.
    """
    kind = instruction.opcode.removesuffix("-start").removeprefix("ragged-")
    if kind not in KINDS or instruction.opcode.endswith("-done"):
        return []
    goes_on = "async_collective_fusion_config" in instruction.attributes
    if goes_on and instruction.attribute("channel_id") in started and not _starts(computation):
        return []
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # the TPU's: all-reduce and dynamic-slice in one fusion
    group = _group_size(instruction, module)
    operands = instruction.operands[:1] if kind == "collective-permute" else instruction.operands
    arrays = [s for name in operands for s in computation.instructions[name].shapes]
    return [_collective(kind, array, group, instruction) for array in arrays]


def _collective(kind: str, array: Shape, group: int, instruction: Instruction) -> Collective:
    sizes = array.sizes
    if kind == "all-gather":
        d = int(re.search(r"dimensions=\{(\d+)\}", instruction.attributes)[1])
        sizes = (*sizes[:d], sizes[d] * group, *sizes[d + 1 :])
    whole = Shape(array.dtype, sizes).bytes
    share = (group - 1) / group if group else 0
    if kind == "collective-permute":
        share = 1 if group else 0
    elif kind == "all-reduce":
        share *= 2
    return Collective(kind, array.dtype, sizes, group, whole * share, 1, (), instruction.op_name)


def _group_size(instruction: Instruction, module: Module) -> int:
    text = instruction.attributes
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        pairs = re.findall(r"(\d+),(\d+)", found[1])
        return sum(source != target for source, target in pairs)
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=", text):  # iota: [groups, size]
        return int(found[1].split(",")[-1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or axes[axis]) for axis, part in named)
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(found[1].split(","))
    return module.devices
