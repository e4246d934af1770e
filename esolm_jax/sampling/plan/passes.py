"""Decode plans: the tables of a family's forward passes for a schedule.

Slot j holds the token of rank j in the generation order. A pass runs, in each row, the window of
slots [start, end): those below `first` are known and enter the cache (or enter it again), the
`size` slots from `first` on are generated, and the rest are masks too. Slots below `start` are in
the cache. A later pass overwrites the masks before a token reads them as known. Families differ in
these tables only:

    family            window of a pass                          rank of slot j
    ar                the newest token                          j (and slot j holds text token j−1)
    eso_b             tokens of the last pass, masks of this    j
    bd3               the block before if new, this block       j // block length
    mdlm              everything                                0
    eso_a, diffusion  everything up to this pass's masks        0 if known, else j
    eso_a, sequential as eso_b, after one pass over the prefix  0 in the diffusion prefix, else j

A prompt comes first in the order. Passes that generate nothing put it in the cache, in windows of a
few sizes (PROMPT_WINDOWS), so that another prompt's length runs the same programs. Where tokens of
one rank read each other (mdlm, eso_a), the prompt is in every window.
"""

from typing import Self

import flax.struct
import numpy as np

from esolm_jax.family import registry
from esolm_jax.family.family import Family, Windows
from esolm_jax.sampling.plan.schedule import Schedule

# (tokens of a prompt, up to; slots of a window): a CPU's time grows with the slots from few on, and
# on GPUs and TPUs 256 take as long as one.
PROMPT_WINDOWS = (16, 16), (512, 64), (np.iinfo(np.int32).max, 256)
MANY = 16  # number of narrow passes that justify a separate program
NEVER = np.iinfo(np.int32).max  # a position, rank or pass that does not exist


@flax.struct.dataclass
class DecodePlan:
    """Tables of the passes, all int32; a pytree, and an argument of the decoding loop.

    Attributes:
      order: [B, L]; known: [B, L], the known tokens by slot (unspecified where unknown).
      rank: [L], the rank of each slot unless it is below `bidirectional_below`.
      start, first, size, end, bidirectional_below: [steps, B], slots as described above; slots
        below `bidirectional_below` are of rank 0.
      num_known: [B], how many leading slots hold known tokens.
      leftmost_unknown: [steps, B], the leftmost position that is still unknown before a pass, or
        NEVER.
      unknown: the token that stands for unknown ones.
      shift: 0, or 1 where slot j holds text token j−1 and predicts token j (AR).
      start_token: the token of slot 0 if shift = 1.
    """

    order: np.ndarray
    known: np.ndarray
    rank: np.ndarray
    start: np.ndarray
    first: np.ndarray
    size: np.ndarray
    end: np.ndarray
    bidirectional_below: np.ndarray
    leftmost_unknown: np.ndarray
    num_known: np.ndarray
    unknown: int = flax.struct.field(pytree_node=False)
    shift: int = flax.struct.field(pytree_node=False, default=0)
    start_token: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def length(self) -> np.ndarray:
        """[B]: tokens of each text."""
        return self.num_known + self.size.sum(axis=0)

    @property
    def prompt_passes(self) -> int:
        """The leading passes that only read the prompt."""
        return int((self.size.max(axis=1) == 0).sum())

    @property
    def nfe(self) -> int:
        """The number of passes that generate tokens."""
        return len(self.size) - self.prompt_passes

    @property
    def reads_cache(self) -> bool:
        """Whether a pass reads slots that an earlier one has filled."""
        return bool(self.start.max(initial=0))

    @property
    def widths(self) -> np.ndarray:
        """[steps]: the widest window of any row."""
        return (self.end - self.start).max(axis=1)

    @property
    def aligned(self) -> bool:
        """Whether all rows always start at the same slot."""
        return bool((self.start == self.start[:, :1]).all())

    @property
    def rows_of_tables(self) -> int:
        """At least the number of steps: programs depend on it, so it does not depend on the prompt
        or on the draws."""
        return _power(max(len(self.size), self.order.shape[1]))

    def padded(self, margin: int) -> Self:
        """The plan for a loop: `margin` more slots, so that every window fits, and tables of
        rows_of_tables rows."""
        order, known = (np.pad(a, ((0, 0), (0, margin))) for a in (self.order, self.known))
        more = self.rows_of_tables - len(self.size)
        names = "start first size end bidirectional_below".split()
        tables = {name: np.pad(getattr(self, name), ((0, more), (0, 0))) for name in names}
        # One row more, because the end of the loop reads the row of the next pass.
        left = np.pad(self.leftmost_unknown, ((0, more + 1), (0, 0)), constant_values=NEVER)
        rank = np.pad(self.rank, (0, margin))
        return self.replace(order=order, known=known, rank=rank, leftmost_unknown=left, **tables)

    def segments(self) -> list[tuple[int, int]]:
        """Ranges [from, to) of passes that share a compiled program: those of the prompt, those up
        to the last window of more than 2 slots, and, if there are many, the narrow ones after it
        (the token of the previous pass, the mask of this pass)."""
        wide, steps = np.nonzero(self.widths > 2)[0], len(self.size)
        cut = max(int(wide[-1]) + 1 if wide.size else 0, self.prompt_passes)
        if self.prompt_passes < cut and steps - cut < MANY:
            cut = steps
        ends = [0, self.prompt_passes, cut, steps]
        return [(a, b) for a, b in zip(ends, ends[1:], strict=False) if b > a]

    def shape_buckets(
        self, low: int, high: int, few_tokens: int = 0
    ) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
        """The shape of each pass of a segment: index [rows_of_tables], and the ascending shapes
        (window, tokens generated), both rounded up to few sizes. The shapes hardly depend on the
        draws, so another seed usually runs the same program.

        Args:
          few_tokens: tokens of all rows that a device runs as fast as two, if not 0; up to it,
            windows have one shape, and above it powers of two. No pass runs one token alone: XLA
            turns its matrix products into sums on a GPU, which write every term.
        """
        index = np.zeros(self.rows_of_tables, np.int32)
        widths, most = self.widths[low:high], int(self.size[low:high].max())
        rounded = [_round_up(width) for width in widths.tolist()]
        if most == 0:  # of a prompt
            return index, ((_prompt_width(int(widths.max()), self.order.shape[1]), 0),)
        rounded = np.maximum(rounded, min(2, max(rounded)))
        if few_tokens and len(self.order) == 1:
            rounded = np.maximum(rounded, 2)
        least, widest = int(rounded.min()), int(rounded.max())
        if few_tokens and least < widest:
            least = min(widest, max(least, few_tokens // self.order.shape[0]))
            wide = np.maximum(rounded, least).tolist()
            rounded = np.array([n if n == least else min(_power(n), widest) for n in wide])
            present = sorted(set(rounded.tolist()))
        else:
            if least < widest <= 128:
                least, widest = 1 << (least.bit_length() - 1), _power(widest)
            present = sorted({_round_up(width) for width in range(least, widest + 1)})
        index[low:high] = np.searchsorted(present, rounded)
        return index, tuple((width, min(width, _power(most))) for width in present)


def _power(n: int) -> int:
    """The smallest power of two that is at least n; 0 for n = 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def _round_up(n: int) -> int:
    """n rounded up to 0, 1, 2, 4, 6, 8, 12, 16, 24, …, 128, or to a multiple of 128 above 128."""
    if n > 128:
        return -(-n // 128) * 128
    power = _power(n)
    between = 3 * power // 4
    return between if power >= 8 and n <= between else power


def _prompt_width(widest: int, length: int) -> int:
    """Slots of the windows of a prompt whose widest has this many."""
    fits = (width for _, width in PROMPT_WINDOWS if width >= widest)
    return min(next(fits, _round_up(widest)), _round_up(length))


def leftmost(order: np.ndarray, length: np.ndarray) -> np.ndarray:
    """int32 [B, L + 1]: the leftmost position among the ranks from this one on, or NEVER. Positions
    beyond `length` [B] do not count."""
    inside = np.arange(order.shape[1])[None] < length[:, None]
    position = np.pad(np.where(inside, order, NEVER), ((0, 0), (0, 1)), constant_values=NEVER)
    return np.minimum.accumulate(position[:, ::-1], axis=1)[:, ::-1].astype(np.int32)


def _tables(schedule: Schedule, windows: Windows, mask_id: int) -> DecodePlan:
    """The passes that fill the cache, then those of the windows. Slots of one rank stay in one
    pass."""
    prefill, rank, length = windows.prefill, windows.rank, schedule.order.shape[1]
    together = int(np.bincount(rank).max(initial=1)) if prefill.any() else 1
    most = int(prefill.max(initial=0))
    size = next(width for tokens, width in PROMPT_WINDOWS if most <= tokens)
    size = max(1, size // together) * together
    chunk = size * np.arange(-(-most // size))[:, None]
    # The last window begins earlier if it would end behind the text: it runs some slots again.
    behind_text = max(0, length - _prompt_width(size, length))
    low = np.minimum(np.minimum(chunk, behind_text), prefill[None])
    high = np.minimum(chunk + size, prefill[None])
    first, done = schedule.first, schedule.sizes == 0
    behind = leftmost(schedule.order, schedule.length)
    limits = windows.start, windows.end, windows.bidirectional_below
    start, end, below = (np.broadcast_to(a, first.shape) for a in limits)
    start, end = (
        np.where(done, 0, start),
        np.where(done, 0, end),
    )  # an empty window that reads no cache
    pairs = {
        "start": (low, start),
        "first": (high, first),
        "size": (np.zeros_like(low), schedule.sizes),
        "end": (high, end),
        "bidirectional_below": (np.zeros_like(low), below),
        "leftmost_unknown": (np.zeros_like(low), np.take_along_axis(behind.T, first, axis=0)),
    }
    return DecodePlan(
        order=schedule.order.astype(np.int32),
        known=schedule.known.astype(np.int32),
        rank=rank.astype(np.int32),
        num_known=schedule.num_known.astype(np.int32),
        **{name: np.concatenate(pair).astype(np.int32) for name, pair in pairs.items()},
        unknown=mask_id,
    )


def make_plan(
    family: Family,
    schedule: Schedule,
    *,
    mask_id: int,
    start_token: int = 0,
    block_length: int = 1,
    is_padded: bool = False,
) -> DecodePlan:
    """The passes of a family for a schedule.

    Args:
      is_padded: all texts may be shorter than their rows, as a canvas may have them.

    Raises:
      UserError: the schedule is invalid, or unsupported by the family.
    """
    schedule.check(is_padded=is_padded)
    windows = family.windows(schedule, block_length)
    tables = _tables(schedule, windows, mask_id)
    return tables.replace(shift=1, start_token=start_token) if family.is_shifted else tables


def plan(config, schedule: Schedule, *, mask_id: int, start_token: int) -> DecodePlan:
    """make_plan of config.objective. Reads objective and block_length."""
    return make_plan(
        registry.get(config.objective),
        schedule,
        mask_id=mask_id,
        start_token=start_token,
        block_length=config.block_length,
        is_padded=True,
    )
