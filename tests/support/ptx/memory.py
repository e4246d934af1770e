"""A GPU's memory, and the shared memory of its programs. Every access is checked."""

import collections

import numpy as np

GAP = 2**20  # bytes between arrays
GARBAGE = 0xAB
EVERY = 63  # warps of a program


class Fault(Exception):
    """An access that a GPU would not allow, or whose result is not defined."""


class Memory:
    """Arrays in one address space.

    Attributes:
      bases: address of each array, operands before results.
      races: what programs do to each other's bytes, counted. Programs run in any order on a GPU, so
        they must not read, or write other bytes, where another one writes.
    """

    def __init__(self, operands, results):
        self.arrays, self.num_operands = [*operands, *results], len(operands)
        ends = np.cumsum([-(-a.nbytes // 256) * 256 + GAP for a in self.arrays])
        self.bases = [GAP, *(int(end) + GAP for end in ends[:-1])]
        size = int(ends[-1]) + GAP
        self.bytes = np.full(size, GARBAGE, np.uint8)
        self.is_array, self.is_result, self.is_set = (np.zeros(size, bool) for _ in range(3))
        self.writer = np.full(size, -1, np.int32)  # program, or -1 = none
        self.reader = np.full(size, -1, np.int32)  # or -2 = several
        self.races = collections.Counter()
        for i, where in enumerate(self._places()):
            self.is_array[where] = True
            if i < self.num_operands:
                array = np.ascontiguousarray(self.arrays[i])
                self.bytes[where] = array.view(np.uint8).reshape(-1)
                self.is_set[where] = True
            else:
                self.is_result[where] = True

    def _places(self):
        return [slice(at, at + a.nbytes) for at, a in zip(self.bases, self.arrays, strict=True)]

    def load(self, address, size: int, program):
        """uint8 [lanes, size]"""
        where, program = _bytes(address, size), program[:, None]
        if not self.is_array[where].all():
            raise Fault("load outside of all arrays")
        if not self.is_set[where].all():
            raise Fault("load of what nothing has written")
        writer, reader = self.writer[where], self.reader[where]
        self.races["read of another's result"] += int(((writer != program) & (writer >= 0)).sum())
        self.reader[where] = np.where((reader == -1) | (reader == program), program, -2)
        return self.bytes[where]

    def store(self, address, data, program) -> None:
        where, program = _bytes(address, data.shape[1]), program[:, None]
        if not self.is_result[where].all():
            raise Fault("store outside of all results")
        writer, reader = self.writer[where], self.reader[where]
        differs = (writer != program) & (writer >= 0) & (self.bytes[where] != data)
        self.races["different writes"] += int(differs.sum())
        self.races["write of what another reads"] += int(
            ((reader != program) & (reader != -1)).sum()
        )
        self.bytes[where] = data
        self.races["different writes"] += int((self.bytes[where] != data).sum())  # at once
        self.is_set[where] = True
        self.writer[where] = program

    def results(self):
        """Fault if nothing wrote a part of them."""
        found = list(zip(self.arrays, self._places(), strict=True))[self.num_operands :]
        if not all(self.is_set[where].all() for _, where in found):
            raise Fault("a part of a result is not written")
        return [self.bytes[where].view(a.dtype).reshape(a.shape) for a, where in found]


class Shared:
    """The shared memory of some programs: 32 banks of 4 bytes.

    Warps run in any order between two barriers of their program, so there they must not read what
    another warp writes, nor write what it reads or writes.

    Attributes:
      bytes: [programs, size].
      written, read: for each of them a stamp: age · 64 + warp of the last access, or -1.
      age: of each program, the barriers that it has passed.
      cycles: how long the accesses of warps take, of 128 bytes a cycle at most, since addresses of
        one bank wait for each other. cycles_at_least: without such conflicts.
    """

    def __init__(self, programs: int, size: int):
        self.bytes = np.full((programs, size), GARBAGE, np.uint8)
        self.written, self.read = (np.full(self.bytes.shape, -1, np.int32) for _ in range(2))
        self.age = np.zeros(programs, np.int32)
        self.cycles = self.cycles_at_least = 0

    def count(self, address, size: int, warp) -> None:
        """Counts an access by lanes of these warps."""
        for of_warp in np.split(address, np.flatnonzero(np.diff(warp)) + 1):
            together = max(1, min(32, 128 // size))
            for start in range(0, len(of_warp), together):
                words = of_warp[start : start + together, None] // 4 + np.arange(-(-size // 4))
                words = np.unique(words)
                self.cycles += int(np.bincount(words % 32).max())
                self.cycles_at_least += -(-len(words) // 32)

    def load(self, address, size: int, program, warp):
        """uint8 [lanes, size]. `program`, `warp`: of each lane, indices; EVERY = all warps."""
        where, stamp = self._places(address, size, program), self._stamps(program, warp)
        written, read = self.written[where], self.read[where]
        if (written < 0).any():
            raise Fault("load of shared memory that nothing has written")
        if _by_another(written, stamp).any():
            raise Fault("load of what another warp writes, without a barrier between")
        self.read[where] = np.where(_by_another(read, stamp), stamp | EVERY, stamp)
        return self.bytes[where]

    def store(self, address, data, program, warp) -> None:
        where = self._places(address, data.shape[1], program)
        stamp = self._stamps(program, warp)
        differs = _by_another(self.written[where], stamp) & (self.bytes[where] != data)
        if (_by_another(self.read[where], stamp) | differs).any():
            raise Fault("store to what another warp reads or writes, without a barrier between")
        self.bytes[where], self.written[where] = data, stamp

    def forget(self, address, size: int, program) -> None:
        """A copy to these bytes is on its way."""
        self.written[self._places(address, size, program)] = -1

    def _places(self, address, size: int, program):
        where = _bytes(address, size)
        if where.size and (where.min() < 0 or where.max() >= self.bytes.shape[1]):
            raise Fault("outside of shared memory")
        return program[:, None], where

    def _stamps(self, program, warp):
        return (self.age[program] * 64 + np.where(warp == EVERY, EVERY, warp % 32))[:, None]


def _by_another(stamps, own):
    """Whether an access is of the same age, by another warp."""
    return (stamps >> 6 == own >> 6) & (stamps != own)


def _bytes(address, size: int):
    if (address % size).any():
        raise Fault("address that is not a multiple of the size")
    return address[:, None] + np.arange(size)
