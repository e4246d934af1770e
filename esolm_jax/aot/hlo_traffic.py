"""What a program, or one iteration of its loop, launches and moves, from optimised HLO text.

Kernels are the instructions that the device launches; bytes are the operands and results of each in
the device's memory. An operand that is only sliced counts as its slices, and an array that is
updated in place as its update. Arrays in a TPU's on-chip memory do not count. FLOPs are those of
hlo.py.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Self

from esolm_jax.aot.chips import Chip
from esolm_jax.aot.hlo import branch_names, first_match, flops_of
from esolm_jax.aot.hlo_loops import Frame, trip_count
from esolm_jax.aot.hlo_parse import Computation, Instruction, Module, Shape, parse

_NOTHING = {  # instructions that launch nothing
    "after-all", "bitcast", "constant", "get-tuple-element", "opt-barrier", "parameter",
    "partition-id", "replica-id", "tuple", "async-update",
}  # fmt: skip
_MARKS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding")  # custom calls without work
_HOST = {"infeed", "outfeed", "send", "recv"}
_SLICES = {"dynamic-slice", "gather", "slice"}
_SAME = {"bitcast", "reshape"}  # views
_PREFETCHES = {"copy-start", "slice-start"}  # asynchronous copies: they overlap with kernels

KernelBytes = Callable[[tuple[Shape, ...]], float]


@dataclasses.dataclass(frozen=True)
class Launch:
    """All executions of one launched instruction.

    Attributes:
      bytes: read and written in the device's memory. flops: of matrix products.
      is_prefetch: an asynchronous copy, which overlaps with kernels.
    """

    name: str
    bytes: float
    flops: float = 0.0
    is_prefetch: bool = False

    def times(self, count: float) -> Self:
        return dataclasses.replace(self, bytes=self.bytes * count, flops=self.flops * count)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The sum over the instructions of a computation.

    Attributes:
      kernels: launched instructions. conditionals: of any depth, each with its dearest branch.
      host_transfers: instructions that exchange data with the host.
      launches: each kernel, in order.
    """

    kernels: float = 0
    conditionals: float = 0
    host_transfers: float = 0
    launches: tuple[Launch, ...] = ()

    @property
    def bytes(self) -> float:
        return sum((launch.bytes for launch in self.launches), 0.0)

    def seconds(self, chip: Chip) -> float:
        """A lower bound of the time, if kernels run one after another, each for the longer of its
        FLOPs and its bytes; asynchronous copies overlap with them."""
        in_order = sum(
            max(launch.flops / chip.flops, launch.bytes / chip.hbm_bandwidth)
            for launch in self.launches
            if not launch.is_prefetch
        )
        return max(in_order, self.bytes / chip.hbm_bandwidth)

    def __add__(self, other: Self) -> Self:
        mine, others = vars(self), vars(other)
        return type(self)(**{name: mine[name] + others[name] for name in mine})

    def times(self, count: float) -> Self:
        """This, executed `count` times."""
        return type(self)(
            self.kernels * count,
            self.conditionals * count,
            self.host_transfers * count,
            tuple(launch.times(count) for launch in self.launches),
        )


def largest_loop(text: str, kernel_bytes: Mapping[str, KernelBytes] = {}) -> Traffic:
    """One iteration of the loop of the entry computation that moves most bytes an iteration.

    Args:
      text: `Compiled.as_text()`.
      kernel_bytes: part of a custom call's op_name → the bytes that one execution moves, as a
        function of its operands; for kernels that read a part of an operand.

    Raises:
      ValueError: there is no loop.
    """
    module = parse(text)
    frame, reader = Frame(module, module.entry), _Reader(module, kernel_bytes)
    found = [reader.of(frame.enter(i, i.attribute("body"))) for i in _loops(module.entry)]
    if not found:
        raise ValueError("text: must have a loop in its entry computation")
    return max(found, key=lambda traffic: traffic.bytes)


def program(
    text: str,
    *,
    trip_counts: Mapping[str, float] = {},
    kernel_flops: Mapping[str, float] = {},
    branches: Mapping[str, int] = {},
) -> Traffic:
    """One run of a program; the mappings are those of hlo.analyse."""
    module = parse(text)
    reader = _Reader(module, {}, trip_counts, kernel_flops, branches)
    return reader.of(Frame(module, module.entry))


def _loops(computation: Computation) -> list[Instruction]:
    return [i for i in computation.instructions.values() if i.opcode == "while"]


@dataclasses.dataclass(frozen=True)
class _Reader:
    module: Module
    kernel_bytes: Mapping[str, KernelBytes]
    trip_counts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    kernel_flops: Mapping[str, float] = dataclasses.field(default_factory=dict)
    branches: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def of(self, frame: Frame) -> Traffic:
        total = Traffic()
        for i in frame.computation.instructions.values():
            total += self._instruction(i, frame)
        return total

    def _instruction(self, i: Instruction, frame: Frame) -> Traffic:
        if (
            i.opcode in _NOTHING
            or i.opcode.endswith("-done")
            or any(f'"{mark}"' in i.attributes for mark in _MARKS)
        ):
            return Traffic()
        if i.opcode == "while":
            count = trip_count(i, frame)
            if count is None:
                count = first_match(self.trip_counts, i.op_name or i.name)
            inside = self.of(frame.enter(i, i.attribute("body")))
            return inside.times(1 if count is None else count)
        if i.opcode == "conditional":
            branches = [self.of(frame.enter(i, name)) for name in branch_names(i, self.module)]
            usual = first_match(self.branches, i.op_name or i.name)
            dearest = max(branches, key=lambda traffic: traffic.bytes)
            return (dearest if usual is None else branches[int(usual)]) + Traffic(conditionals=1)
        if i.opcode in ("call", "async-start"):
            name = (i.names("to_apply") or i.names("called_computation") or i.names("calls"))[0]
            return self.of(frame.enter(i, name))
        size, flops = self._bytes(i, frame.computation), flops_of(i, frame, self.kernel_flops)
        launch = Launch(i.name, size, flops, i.opcode in _PREFETCHES)
        return Traffic(1, 0, int(i.opcode in _HOST), (launch,))

    def _bytes(self, i: Instruction, computation: Computation) -> float:
        if i.opcode == "custom-call":
            for name, size_of in self.kernel_bytes.items():
                if name in i.op_name:
                    operands = (computation.instructions[o].shapes for o in i.operands)
                    return size_of(tuple(s for shapes in operands for s in shapes))
        if i.opcode == "fusion":
            inside = _fused(i, self.module)
            shapes = [computation.instructions[name].shapes for name in i.operands]
            read = sum(
                _read(self.module, inside, inside.parameters[n], _stored(of))
                for n, of in enumerate(shapes)
                if n in inside.parameters
            )
            return read + _written(self.module, inside, inside.root, i.shapes)
        operands = [computation.instructions[name] for name in i.operands]
        if i.opcode in _SLICES:
            return 2 * _stored(i.shapes)
        if i.opcode in ("dynamic-update-slice", "scatter"):
            return 2 * _stored(operands[1 if i.opcode[0] == "d" else 2].shapes)
        if i.opcode in _PREFETCHES:  # one side is on the chip
            to = i.shapes[0 if i.opcode == "copy-start" else 1]
            ends = [*(s for o in operands for s in o.shapes), to]
            return to.stored_bytes * sum(not end.is_on_chip for end in ends)
        return sum(_stored(o.shapes) for o in operands) + _stored(i.shapes)


def _stored(shapes: tuple[Shape, ...]) -> float:
    return sum(s.stored_bytes for s in shapes if not s.is_on_chip)


def _fused(i: Instruction, module: Module) -> Computation:
    return module.computations[i.names("calls")[0]]


def _read(module: Module, inside: Computation, name: str, whole: float) -> float:
    """Bytes that a fused computation, and those fused into it, read of a value of `whole` bytes."""
    if not whole or name == inside.root.name:  # a result: whoever fused this reads it
        return whole
    read = 0.0
    for user in inside.instructions.values():
        if name not in user.operands:
            continue
        if user.opcode in _SLICES and user.operands[0] == name:
            read += _stored(user.shapes)
        elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
            continue
        elif user.opcode in _SAME:
            read += _read(module, inside, user.name, whole)
        elif user.opcode == "fusion":
            inner = _fused(user, module)
            places = [n for n, operand in enumerate(user.operands) if operand == name]
            read += sum(_read(module, inner, inner.parameters[n], whole) for n in places)
        else:
            return whole
    return min(read, whole)


def _written(
    module: Module, inside: Computation, root: Instruction, shapes: tuple[Shape, ...]
) -> float:
    """Bytes of the result of a fusion; of an update in place, the update."""
    while root.opcode in _SAME:
        root = inside.instructions[root.operands[0]]
    if root.opcode == "tuple":
        parts, written = [inside.instructions[name] for name in root.operands], 0.0
        for part in parts:  # which may have several results of its own
            own, shapes = shapes[: len(part.shapes)], shapes[len(part.shapes) :]
            written += _written(module, inside, part, own)
        return written
    if root.opcode == "fusion":
        inner = _fused(root, module)
        return _written(module, inner, inner.root, shapes)
    if root.opcode in ("dynamic-update-slice", "scatter"):
        update = inside.instructions[root.operands[1 if root.opcode[0] == "d" else 2]]
        return _stored(update.shapes)
    return _stored(shapes)
