"""Canvases: the known tokens of each text before generation. Host side, NumPy."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np

from esolm_jax.errors import UserError

MASK = -1  # in a request: to be generated


@dataclasses.dataclass(frozen=True)
class Seed:
    """The source of a row's randomness, independent of the other rows and their number.

    Step sizes, and the strides of a strided order, follow from `batch` and the number of tokens to
    generate, so that equal rows take equal steps; everything else follows from both numbers.
    """

    batch: int
    row: int

    def of_row(self) -> np.random.Generator:
        return np.random.default_rng([self.batch, 0, self.row])

    def of_sizes(self, count: int) -> np.random.Generator:
        return np.random.default_rng([self.batch, 1, count])


@dataclasses.dataclass(frozen=True)
class Canvas:
    """The texts of a batch, some of whose tokens are known.

    Attributes:
      token: int32 [B, L]; unspecified where a token is unknown.
      known: bool [B, L]; False beyond a row's length.
      length: int32 [B], tokens of each text, at most L.
      seeds: one for each row.
    """

    token: np.ndarray
    known: np.ndarray
    length: np.ndarray
    seeds: tuple[Seed, ...]

    @classmethod
    def empty(cls, batch: int, length: int, seed: int = 0) -> Self:
        """Nothing is known: unconditional sampling."""
        shape = batch, length
        seeds = tuple(Seed(seed, row) for row in range(batch))
        return cls(np.zeros(shape, np.int32), np.zeros(shape, bool), np.full(batch, length), seeds)

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], seeds, *, vocab_size: int, mask_id: int) -> Self:
        """A canvas from token ids per row, MASK where a token is to be generated.

        Raises:
          UserError: a token is not in the vocabulary, or is its mask; or a row has no seed.
        """
        if len(seeds) != len(rows):
            raise UserError(f"seeds: must be one for each of {len(rows)} rows, not {len(seeds)}")
        length = np.array([len(row) for row in rows])
        token = np.full((len(rows), max(1, length.max(initial=0))), MASK, np.int32)
        for b, row in enumerate(rows):
            if b and row is rows[b - 1]:  # another text of the same prompt
                token[b] = token[b - 1]
                continue
            for at, one in enumerate(row):
                is_token = isinstance(one, int | np.integer) and 0 <= one < vocab_size
                if one != MASK and (not is_token or one == mask_id):
                    what = "the mask token" if one == mask_id else f"not in 0..{vocab_size - 1}"
                    raise UserError(f"prompt {b}: token {one} at position {at} is {what}")
            token[b, : len(row)] = row
        return cls(np.maximum(token, 0), token != MASK, length, tuple(seeds))

    @property
    def num_known(self) -> np.ndarray:
        """[B]: the number of known tokens."""
        return self.known.sum(axis=1)

    def unknown(self, row: int) -> np.ndarray:
        """The positions to be generated, ascending."""
        return np.nonzero(~self.known[row, : self.length[row]])[0]

    def remask(self, row: int, start: int, stop: int) -> Self:
        """This canvas with the positions [start, stop) of a row masked again. All other tokens are
        kept. Masked positions come last in the order, so no stale cache entry is read."""
        if not 0 <= row < len(self.length):
            raise UserError(f"text {row}: must be in 0..{len(self.length) - 1}")
        if not 0 <= start < stop <= self.length[row]:
            raise UserError(
                f"span {start}:{stop} of text {row}: must be non-empty and in 0:{self.length[row]}"
            )
        known = self.known.copy()
        known[row, start:stop] = False
        return dataclasses.replace(self, known=known)

    def with_all_known(self, token: np.ndarray, eos_position: np.ndarray | None = None) -> Self:
        """This canvas with these tokens, all known, to edit generated texts. `eos_position` [B]
        shortens texts that ended early."""
        if token.shape != self.token.shape:
            raise UserError(
                f"tokens {token.shape}: must have the canvas's shape {self.token.shape}"
            )
        length = self.length if eos_position is None else np.minimum(self.length, eos_position)
        known = np.arange(token.shape[1])[None] < length[:, None]
        return dataclasses.replace(
            self, token=np.asarray(token, np.int32), known=known, length=length
        )
