"""Limits memory and time of a pickle reader in proportion to the size of the file.

A few hundred bytes of a pickle can reference one object many times, and each copy takes memory.
"""

from esolm_jax.errors import UserError

BASE = 16 * 2**20  # bytes
PER_BYTE = 32  # bytes of objects per byte of a pickle; ordinary ones take 2 to 8
MAX_STEPS = 5_000_000  # opcodes; a checkpoint has about 100,000
MAX_PICKLE = 256 * 2**20  # bytes; tensors are not in the pickle


class Budget:
    """Counts the bytes and steps of a reader."""

    def __init__(self, size: int, where: str):
        """Args: size: of the pickle, in bytes. where: names the file in errors."""
        if size > MAX_PICKLE:
            raise UserError(
                f"{where}: refused: its pickle has {size:,} bytes; must have at most {MAX_PICKLE:,}"
            )
        self._size, self._where = size, where
        self._bytes, self._steps = BASE + PER_BYTE * size, MAX_STEPS

    def charge(self, size: int) -> None:
        """One step that builds, copies or compares `size` bytes. UserError: beyond the budget."""
        self._bytes -= size
        self._steps -= 1
        if self._bytes < 0 or self._steps < 0:
            what = "memory" if self._bytes < 0 else "steps"
            raise UserError(
                f"{self._where}: refused: reading its pickle of {self._size:,} bytes takes more "
                f"{what} than any checkpoint of this size needs"
            )
