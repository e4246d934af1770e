"""The trip count of a while loop of HLO text, from its condition.

XLA and its TPU compiler do not always annotate loops with their trip counts. The trip count follows
from the comparison in the condition, the initial value of the counter and its increment. Each is a
constant, possibly passed through copies, fusions and outer loops.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

from esolm_jax.aot.hlo_parse import Computation, Instruction, Module

SAME = {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done"}
ARITHMETIC = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
}


@dataclasses.dataclass(frozen=True)
class Frame:
    """One computation as reached by one chain of calls.

    Attributes:
      call: the instruction of `parent` that called it; None for the entry.
      counters: assumed values of elements of a loop's carry, by index; instead of reading them.
    """

    module: Module
    computation: Computation
    call: Instruction | None = None
    parent: "Frame | None" = None
    counters: Mapping[int, int] | None = None

    def enter(self, call: Instruction, name: str, **counters) -> "Frame":
        return Frame(self.module, self.module.computations[name], call, self, **counters)


def trip_count(loop: Instruction, frame: Frame) -> int | None:
    """Executions of the body of `loop`, a while in `frame`; None if they depend on data."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition, body = loop.attribute("condition"), loop.attribute("body")
    read = frame.module.computations[condition].instructions.values()
    indices = {_index(i) for i in read if i.opcode == "get-tuple-element"}
    for index in sorted(indices):
        first = _element(loop.operands[0], index, frame)
        cond = [_compare(frame.enter(loop, condition, counters={index: v})) for v in (0, 1)]
        if first is None or None in cond:
            continue
        bodies = [frame.enter(loop, body, counters={index: v}) for v in (0, 1)]
        after = [_element(b.computation.root.name, index, b) for b in bodies]
        if None in after or after[1] - after[0] != 1:
            continue
        (direction, at_zero), (_, at_one) = cond
        slope = at_one - at_zero
        return _count(direction, at_zero + slope * first, slope * after[0])
    return None


def _count(direction: str, difference: int, step: int) -> int | None:
    """The number of executions while `difference DIRECTION 0` holds; each adds `step`."""
    if direction in ("GT", "GE"):
        direction, difference, step = {"GT": "LT", "GE": "LE"}[direction], -difference, -step
    if direction == "NE" and step and difference % step == 0 and -difference // step >= 0:
        return -difference // step
    if direction == "LE":
        direction, difference = "LT", difference - 1
    if direction != "LT":
        return None
    if difference >= 0:
        return 0
    return math.ceil(-difference / step) if step > 0 else None


def _compare(frame: Frame) -> tuple[str, int] | None:
    """(direction, left - right) of the compare that a condition returns, possibly in a fusion."""
    root = frame.computation.root
    while root.opcode == "fusion" or root.opcode in SAME:
        if root.opcode == "fusion":
            frame = frame.enter(root, root.attribute("calls"))
            root = frame.computation.root
        else:
            root = frame.computation.instructions[root.operands[0]]
    if root.opcode != "compare":
        return None
    left, right = (_integer(name, frame) for name in root.operands)
    if left is None or right is None:
        return None
    return root.attribute("direction"), left - right


def _index(instruction: Instruction) -> int:
    return int(instruction.attribute("index"))


def _integer(name: str, frame: Frame) -> int | None:
    """The value of a scalar that is known at compile time."""
    i = frame.computation.instructions[name]
    if i.opcode == "constant":
        return int(i.arguments) if re.fullmatch(r"-?\d+", i.arguments) else None
    if i.opcode in SAME:
        return _integer(i.operands[0], frame)
    if i.opcode in ARITHMETIC:
        values = [_integer(operand, frame) for operand in i.operands]
        return None if None in values else ARITHMETIC[i.opcode](*values)
    if i.opcode == "fusion":
        inside = frame.enter(i, i.attribute("calls"))
        return _integer(inside.computation.root.name, inside)
    if i.opcode == "parameter" and frame.call and frame.call.opcode in ("fusion", "call"):
        return _integer(frame.call.operands[int(i.arguments)], frame.parent)
    if i.opcode == "get-tuple-element":
        return _element(i.operands[0], _index(i), frame)
    return None


def _element(name: str, index: int, frame: Frame) -> int | None:
    """The value of one element of a tuple, if it is a scalar that is known at compile time."""
    i = frame.computation.instructions[name]
    if i.opcode == "tuple":
        return _integer(i.operands[index], frame)
    if i.opcode in SAME or i.opcode == "opt-barrier":
        return _element(i.operands[0], index, frame)
    if i.opcode == "fusion":
        inside = frame.enter(i, i.attribute("calls"))
        return _element(inside.computation.root.name, index, inside)
    if i.opcode == "while" and _invariant(i, index, frame.module):
        return _element(i.operands[0], index, frame)
    if i.opcode != "parameter" or frame.call is None:
        return None
    if frame.call.opcode == "while":
        if frame.counters and index in frame.counters:
            return frame.counters[index]
        if not _invariant(frame.call, index, frame.module):
            return None
        return _element(frame.call.operands[0], index, frame.parent)
    if frame.call.opcode in ("fusion", "call"):
        return _element(frame.call.operands[int(i.arguments)], index, frame.parent)
    return None


def _invariant(loop: Instruction, index: int, module: Module) -> bool:
    """Whether the body of a while returns this element unchanged."""
    body = module.computations[loop.attribute("body")]
    if body.root.opcode != "tuple":
        return False
    i = body.instructions[body.root.operands[index]]
    while i.opcode in SAME:
        i = body.instructions[i.operands[0]]
    if i.opcode != "get-tuple-element" or _index(i) != index:
        return False
    return body.instructions[i.operands[0]].opcode == "parameter"
