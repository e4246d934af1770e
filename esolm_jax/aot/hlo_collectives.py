"""Bytes that one chip sends in the collectives of HLO text."""

import dataclasses
import math
import re
from collections.abc import Iterable

from esolm_jax.aot.hlo_parse import Computation, Instruction, Module, Shape

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "send")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array in one collective; a combined collective of several arrays makes several.

    A compiler may write one collective as another: the TPU's gathers narrow shards by an all-reduce
    of zero-padded arrays, which costs twice. It is counted as written; shape is the whole array.

    Attributes:
      kind: one of KINDS; "send" is over the slow network between TPU slices.
      dtype, shape: the whole array: gathered, or still to be scattered or reduced; of the other
        kinds what one chip holds.
      group: chips that take part together; of a permutation, those that send; of a send, 2.
      bytes: what one chip sends in one execution, with ring algorithms: array · (n - 1) / n for
        all-gather, reduce-scatter and all-to-all on n chips, twice that for all-reduce, the array
        for a permutation or send.
      executions: in one run of the program.
      loops: op_names of the while loops around it, outermost first.
      op_name: path of jax.named_scope and transformations; of a combined collective or where the
        compiler dropped it, that of what it sends or of the fusion around it.
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
    """Channels of collectives that the TPU compiler overlaps with other fusions.

    It repeats such a collective, with the same channel, in the fusion that starts it, in the
    overlapped fusions and in the fusion that ends it.
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

    An asynchronous pair counts where it starts. `started`: the result of started_channels.
    """
    kind = instruction.opcode.removesuffix("-start").removeprefix("ragged-")
    if kind not in KINDS:
        return []
    goes_on = "async_collective_fusion_config" in instruction.attributes
    if goes_on and instruction.attribute("channel_id") in started and not _starts(computation):
        return []
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # the TPU's: all-reduce and dynamic-slice in one fusion
    one = kind in ("collective-permute", "send")  # other operands are offsets and tokens
    operands = [computation.instructions[name] for name in instruction.operands]
    operands = operands[: 1 if one else None]
    group = _group_size(kind, instruction.attributes, module)
    share = _share(kind, group)
    messages = []
    for operand in operands:
        name = _op_name(instruction if len(operands) == 1 else operand, computation)
        for part in operand.shapes:
            a = _whole(kind, part, group, instruction)
            messages.append(Collective(kind, a.dtype, a.sizes, group, a.bytes * share, 1, (), name))
    return messages


def bytes_by_kind(messages: Iterable[Collective]) -> dict[str, float]:
    """kind → bytes that one chip sends in one run of the program."""
    total = {}
    for m in messages:
        total[m.kind] = total.get(m.kind, 0) + m.bytes * m.executions
    return total


def _whole(kind: str, array: Shape, group: int, instruction: Instruction) -> Shape:
    if kind != "all-gather":
        return array
    d = int(re.search(r"[ ,]dimensions=\{(\d+)\}", instruction.attributes)[1])
    return Shape(array.dtype, (*array.sizes[:d], array.sizes[d] * group, *array.sizes[d + 1 :]))


def _share(kind: str, group: int) -> float:
    """Bytes sent for one byte of the array."""
    if kind in ("collective-permute", "send"):
        return 1 if group else 0
    return (2 if kind == "all-reduce" else 1) * (group - 1) / group


def _op_name(instruction: Instruction, computation: Computation) -> str:
    """Its op_name, else the first one that its operands or theirs have."""
    waiting, seen = [instruction], set()
    for i in waiting:
        if i.op_name:
            return i.op_name
        new = [name for name in i.operands if name not in seen]
        seen.update(new)
        waiting += [computation.instructions[name] for name in new]
    return ""


def _group_size(kind: str, text: str, module: Module) -> int:
    if kind == "send":
        return 2
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
