"""Runs the programs of a kernel: all lanes (threads) at once, in NumPy.

Lanes at the same instruction run together, those at the first instruction first. A barrier is
passed when no lane can run otherwise.
"""

import re

import numpy as np

from ptx import matrix, scalar
from ptx.memory import GARBAGE, Fault, Memory, Shared
from ptx.program import Instruction, names, parse

WARP = 32
NOTHING = ("bar", "fence", "griddepcontrol")  # without effect here; bar.warp
# The parts of an instruction's name that the machine knows, besides opcodes and sizes.
KNOWN = {*scalar.TYPES, *scalar.PAIRS, *scalar.COMPARE}.union(
    """aligned approx async bfly ca cg col commit_group down fence ftz full global hi idx lo
    mma_async nc param param::entry proxy rm rn rna row sat shared shared::cta sync tf32 to trans
    uni wait wait_group warp wide""".split()
)


def execute(text: str, name: str, grid, shared_bytes: int, operands, results, *, late_copies: bool):
    """Runs a kernel over a grid of programs.

    Args:
      text: PTX. grid: of three axes.
      operands, results: arrays; of results, shapes and dtypes count.
      late_copies: asynchronous copies to shared memory are done when the kernel waits for them, and
        else at once. A kernel must be right either way.

    Returns:
      (results; races, see Memory; how many times as long shared memory takes as without conflicts.)

    Raises:
      Fault: see memory.py. NotImplementedError: an instruction is not known.
    """
    memory = Memory(operands, results)
    machine = _Machine(parse(text, name), grid, shared_bytes, memory, late_copies)
    cycles = cycles_at_least = 1
    for first in range(0, int(np.prod(grid)), 16):  # programs at a time; as many as fit caches
        machine.run(np.arange(first, min(first + 16, int(np.prod(grid)))))
        cycles += machine.shared.cycles
        cycles_at_least += machine.shared.cycles_at_least
    return memory.results(), +memory.races, cycles / cycles_at_least


class _Machine:
    """Attributes:
    program_of, local: of each lane, its program and the index of that among those that run.
    lanes: those that execute the instruction. registers: by name, an array of all lanes.
    """

    def __init__(self, program, grid, shared_bytes: int, memory: Memory, late_copies: bool):
        self.program, self.grid, self.shared_bytes = program, grid, shared_bytes
        self.memory, self.late_copies = memory, late_copies
        for instruction in program.instructions:
            _check(instruction)

    def run(self, programs) -> None:
        threads = self.program.threads
        self.program_of = np.repeat(programs.astype(np.int32), threads)
        self.local = np.repeat(np.arange(len(programs)), threads)
        self.shared = Shared(len(programs), self.shared_bytes)
        self.registers = self._special(threads)
        self.copies: list[tuple] = []  # (lanes, group of each, to, from, size, bytes to read)
        self.groups = np.zeros(self.local.size, int)  # of copies, that a lane has closed
        running, waiting = {0: np.ones(self.local.size, bool)}, {}
        while running or waiting:
            if running:
                self._step(running, waiting)
            else:
                self._pass_barrier(running, waiting)

    def _special(self, threads: int) -> dict:
        x, y, _ = self.grid
        ids = self.program_of % x, self.program_of // x % y, self.program_of // (x * y)
        special = {f"%ctaid.{a}": i.astype(np.uint32) for a, i in zip("xyz", ids, strict=True)}
        thread = np.tile(np.arange(threads, dtype=np.uint32), len(self.local) // threads)
        return special | {"%tid.x": thread}

    def _pass_barrier(self, running, waiting) -> None:
        at = min(waiting)
        lanes = waiting.pop(at)
        for others in waiting.values():
            if np.intersect1d(self.local[lanes], self.local[others]).size:
                raise Fault("threads of a program wait at different barriers")
        self.shared.age[np.unique(self.local[lanes])] += 1
        running[at + 1] = lanes

    def _step(self, running, waiting) -> None:
        at = min(running)
        here = running.pop(at)
        instruction = self.program.instructions[at]
        opcode, lanes = instruction.name[0], here
        if instruction.guard:
            name, negated = instruction.guard
            lanes = here & (self.get(name, "pred") != negated)

        def go(where: int, who) -> None:
            if who.any():
                running[where] = running[where] | who if where in running else who

        if opcode == "bar" and instruction.name[1] == "sync":
            waiting[at] = waiting[at] | here if at in waiting else here
        elif opcode == "bra":
            go(self.program.labels[instruction.operands[0]], lanes)
            go(at + 1, here & ~lanes)
        elif opcode == "ret":
            go(at + 1, here & ~lanes)
        else:
            if lanes.any():
                self.lanes = lanes
                self._execute(instruction)
            go(at + 1, here)

    def _execute(self, instruction: Instruction) -> None:
        name, operands = instruction.name, instruction.operands
        own = {"ld": self._ld, "st": self._st, "cp": self._cp, "shfl": self._shfl, "mov": self._mov}
        try:
            if name[0] in own:
                own[name[0]](name, operands)
            elif name[0] in matrix.INSTRUCTIONS:
                matrix.INSTRUCTIONS[name[0]](self, name, operands)
            elif name[0] not in NOTHING:
                y = scalar.compute(name, lambda i, kind: self.get(operands[i + 1], kind))
                if y is None:
                    raise NotImplementedError("unknown instruction")
                self.put(operands[0], y)
        except Exception as error:
            error.add_note(instruction.text)
            raise

    def whole_warps(self, size: int = WARP):
        """bool [warps], or of other groups of lanes, which of them execute the instruction."""
        active = self.lanes.reshape(-1, size)
        if (active.any(axis=1) != active.all(axis=1)).any():
            raise Fault("a part of a warp executes what warps execute together")
        return active[:, 0]

    # Operands

    def get(self, operand: str, kind: str):
        """As an array of a type: of all lanes, or of one element for a constant."""
        dtype = np.dtype(scalar.TYPES[kind])
        if operand.startswith("0f"):
            return np.array([int(operand[2:], 16)], np.uint32).view(dtype)
        if re.match(r"-?\d", operand):
            value = int(operand.rstrip("U"), 0)
            if kind == "pred":
                return np.array([value != 0])
            mask = 2 ** (8 * dtype.itemsize) - 1
            return np.array([value & mask], f"u{dtype.itemsize}").view(dtype)
        if operand == "global_smem":
            return np.zeros(1, dtype)
        return scalar.bits(self._register(operand), dtype.itemsize).view(dtype)

    def put(self, operand: str, value) -> None:
        """To the lanes that execute; `_` is nowhere. A signed number keeps its sign in a wider
        register."""
        if operand == "_":
            return
        old = self._register(operand)
        if value.dtype.kind == "i":
            value = value.astype(f"i{old.dtype.itemsize}")
        value = scalar.bits(value, old.dtype.itemsize)
        self.registers[operand] = np.where(self.lanes, value, old)

    def _register(self, name: str):
        if name not in self.registers:
            kind = self.program.types[name if "@" in name else name.rstrip("0123456789")]
            size = np.dtype(scalar.TYPES[kind]).itemsize
            garbage = np.full((self.local.size, size), GARBAGE, np.uint8)
            self.registers[name] = (
                garbage[:, 0] > 0 if kind == "pred" else _view(garbage, f"u{size}")
            )
        return self.registers[name]

    def every(self, operand: str, kind: str):
        """`get`, of all lanes."""
        return np.broadcast_to(self.get(operand, kind), self.local.shape)

    def address(self, operand: str):
        """Of all lanes; `[a + 4]`."""
        base, offset = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand).groups()
        return self.every(base, "b64").astype(np.int64) + int(offset or "0", 0)

    def _mov(self, name, operands) -> None:
        """Also from or to a vector: the parts of a register, the lowest bits first."""
        to, of = map(names, operands)
        size = np.dtype(scalar.TYPES[name[-1]]).itemsize // max(len(to), len(of))
        if len(of) > 1:
            parts = [scalar.bits(self.every(part, f"b{8 * size}"), size) for part in of]
            self.put(to[0], np.stack(parts, axis=1).view(f"u{size * len(of)}")[:, 0])
        elif len(to) > 1:
            parts = np.ascontiguousarray(self.every(of[0], name[-1]))[:, None].view(f"u{size}")
            for i, part in enumerate(to):
                self.put(part, parts[:, i])
        else:
            self.put(to[0], self.get(of[0], name[-1]))

    # Memory

    def _ld(self, name, operands) -> None:
        if name[1].startswith("param"):
            at = self.memory.bases[self.program.parameters.index(operands[1].strip("[ ]"))]
            self.put(operands[0], np.full(self.local.size, at))
            return
        targets, size = names(operands[0]), int(name[-1][1:]) // 8
        place, owners = self._space(name)
        address = self.address(operands[1])[self.lanes]
        self._count(place, address, size * len(targets))
        data = place.load(address, size * len(targets), *owners)
        for i, target in enumerate(targets):
            value = np.zeros(self.local.size, f"{'i' if name[-1][0] == 's' else 'u'}{size}")
            value[self.lanes] = _view(data[:, i * size : (i + 1) * size], value.dtype)
            self.put(target, value)

    def _st(self, name, operands) -> None:
        values = [self.every(value, name[-1])[self.lanes] for value in names(operands[1])]
        place, owners = self._space(name)
        data = np.stack(values, axis=1).view(np.uint8)
        address = self.address(operands[0])[self.lanes]
        self._count(place, address, data.shape[1])
        place.store(address, data, *owners)

    def _count(self, place, address, size: int) -> None:
        if place is self.shared:
            place.count(address, size, np.flatnonzero(self.lanes) // WARP)

    def _space(self, name):
        if "shared" in name:
            return self.shared, (self.local[self.lanes], np.flatnonzero(self.lanes) // WARP)
        return self.memory, (self.program_of[self.lanes],)

    def _cp(self, name, operands) -> None:
        if name[2] == "commit_group":
            self.groups[self.lanes] += 1
        elif name[2] == "wait_group":
            self._finish_copies(int(operands[0]))
        else:
            lanes, size = np.flatnonzero(self.lanes), int(operands[2], 0)
            sizes = np.full(lanes.size, size)
            read = self.every(operands[3], "u32")[lanes] if operands[3:] else sizes
            assert ((read == 0) | (read == size)).all(), "a copy of some bytes, and zeros"
            to, of = (self.address(operand)[lanes] for operand in operands[:2])
            self.shared.forget(to, size, self.local[lanes])
            self._count(self.shared, to, size)
            self.copies.append((lanes, self.groups[lanes], to, of, sizes, read))
            if not self.late_copies:
                self._finish_copies(-1)

    def _finish_copies(self, keep: int) -> None:
        """All but the last `keep` groups of each lane."""
        left = []
        for copy in self.copies:
            lanes, group, to, of, sizes, read = copy
            done = self.lanes[lanes] & (group < self.groups[lanes] - keep)
            data = np.zeros((int(done.sum()), sizes[0]), np.uint8)
            some = done & (read > 0)
            loaded = self.memory.load(of[some], sizes[0], self.program_of[lanes[some]])
            data[read[done] > 0] = loaded
            self.shared.store(to[done], data, self.local[lanes[done]], lanes[done] // WARP)
            left += [] if done.all() else [tuple(part[~done] for part in copy)]
        self.copies = left

    # Warps

    def warps(self, operand: str, kind: str = "b32"):
        """[warps, 32]"""
        return self.every(operand, kind).reshape(-1, WARP)

    def _shfl(self, name, operands) -> None:
        self.whole_warps()
        assert operands[3] == "31", "lanes in groups smaller than a warp"
        lane, by = np.arange(WARP), self.warps(operands[2]).astype(int)
        other = {"bfly": lane ^ by, "down": lane + by, "idx": by % WARP}[name[2]]
        other = np.where(other < WARP, other, lane)
        value = np.take_along_axis(self.warps(operands[1]), other, 1)
        self.put(operands[0], value.reshape(-1))


def _check(instruction: Instruction) -> None:
    for part in instruction.name[1:]:
        if part not in KNOWN and not re.fullmatch(r"[vx]\d|m\d+n\d+(k\d+)?", part):
            raise NotImplementedError(f"unknown modifier {part}: {instruction.text}")


def _view(data, dtype):
    return np.ascontiguousarray(data).view(dtype)[:, 0]
