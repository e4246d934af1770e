"""Optimised HLO text → computations and instructions: the subset that hlo.py needs."""

import dataclasses
import functools
import re
from collections.abc import Mapping

BITS = {
    "pred": 8,
    "token": 0,
    "opaque": 0,
}  # other element types end in their width: bf16, f8e4m3fn


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: element type as HLO spells it ("bf16"), sizes, and the text of its layout."""

    dtype: str
    sizes: tuple[int, ...]
    layout: str = dataclasses.field(default="", compare=False)

    @property
    def elements(self) -> int:
        return functools.reduce(lambda a, b: a * b, self.sizes, 1)

    @property
    def bytes(self) -> float:
        bits = BITS.get(self.dtype)
        if bits is None:
            bits = int(re.match(r"[a-z]+(\d+)", self.dtype)[1])
        return self.elements * bits / 8

    @property
    def is_on_chip(self) -> bool:
        """Whether it is in a TPU's VMEM or SMEM (a memory space other than 0)."""
        return bool(re.search(r"S\([1-9]\d*\)", self.layout))

    @property
    def stored_bytes(self) -> float:
        """Bytes in memory, with the padding of a TPU's tiles."""
        order = re.match(r"\{([\d,]*):T\((\d+(?:,\d+)*)\)", self.layout)
        if not order or not order[1]:
            return self.bytes
        sizes = list(self.sizes)
        tile = [int(n) for n in order[2].split(",")]
        for dim, size in zip(order[1].split(","), reversed(tile), strict=False):
            sizes[int(dim)] = -(-sizes[int(dim)] // size) * size
        return Shape(self.dtype, tuple(sizes)).bytes


def shapes(text: str) -> tuple[Shape, ...]:
    """All arrays of a type; tuples are flattened."""
    arrays = r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?"
    return tuple(
        Shape(dtype, tuple(int(s.lstrip("<=")) for s in sizes.split(",") if s), layout)
        for dtype, sizes, layout in re.findall(arrays, text)
    )


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = type opcode(operands), attributes`; `arguments` is the text between the brackets."""

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r"%([\w.\-]+)", self.arguments))

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        return shapes(self.type)

    @functools.cached_property
    def op_name(self) -> str:
        """Path of jax.named_scope and transformations, or ""."""
        match = re.search(r'(?:^|[ ,])metadata=\{[^}]*?op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def attribute(self, name: str) -> str | None:
        """The text of `name=…` up to the next comma or space; None if absent."""
        match = re.search(rf"(?:^|[ ,]){name}=%?([^\s,]+)", self.attributes)
        return match[1] if match else None

    def names(self, name: str) -> tuple[str, ...]:
        """The computations in `name={%a, %b}`, or in `name=%a`."""
        match = re.search(rf"(?:^|[ ,]){name}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return tuple(re.findall(r"%([\w.\-]+)", match[1])) if match else ()


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Number of a parameter → its name."""
        listed = self.instructions.values()
        return {int(i.arguments): i.name for i in listed if i.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Module:
    computations: Mapping[str, Computation]
    entry: Computation
    devices: int


def parse(text: str) -> Module:
    """Reads the text of one HLO module (`Compiled.as_text()`).

    Raises:
      ValueError: no ENTRY computation in it.
    """
    computations, entry, header = {}, None, None
    for line in text.splitlines():
        if header is None:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
            lines = []
        elif line == "}" or line.startswith("}, execution_thread"):
            done = _computation(header[2], lines)
            computations[done.name] = done
            entry = done if header[1] else entry
            header = None
        elif re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line):
            lines.append(line)
        else:  # attributes of a Pallas kernel may span several lines
            lines[-1] += " " + line
    if entry is None:
        raise ValueError("text: must be an HLO module with an ENTRY computation")
    first = text.split("\n", 1)[0]
    counts = [int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", first)]
    return Module(computations, entry, functools.reduce(lambda a, b: a * b, counts, 1))


def _computation(name: str, lines: list[str]) -> Computation:
    instructions = {i.name: i for i in map(_instruction, lines)}
    root = next(line for line in lines if line.lstrip().startswith("ROOT "))
    return Computation(name, instructions, instructions[_instruction(root).name])


def _instruction(line: str) -> Instruction:
    match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    start = match.end()
    stop = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opcode = re.compile(r"\s*([\w\-]+)\(").match(line, stop)
    end = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : end - 1]
    return Instruction(match[1], line[start:stop], opcode[1], inside, line[end:].lstrip(", "))


def _closing(line: str, start: int) -> int:
    """Index after the bracket that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"unbalanced brackets in HLO: {line[:200]}")
