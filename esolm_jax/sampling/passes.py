"""From a schedule to the forward passes of a family: the tables that drive the decoding loop.

Slot j of the KV cache holds the token of rank j in the generation order. A pass runs the window of
slots [start, start + width): those below `first` are known and enter the cache (or enter it
again), the `size` slots from `first` on are generated, slots from `end` on are filler that nobody
reads. Whatever is still a mask is rewritten by a later pass, before anyone reads it as known.
The families differ in these tables alone:

    family            window of a pass                          rank of slot j
    ar                the newest token                          j (and slot j holds text token j−1)
    eso_b             tokens of the last pass, masks of this    j
    bd3               the block before if new, this block       j // block length
    mdlm              everything                                0
    eso_a, diffusion  everything up to this pass's masks        0 if known, else j
    eso_a, sequential as eso_b, after one pass over the prefix  0 in the diffusion prefix, else j
"""

from typing import Self

import flax.struct
import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.sampling import schedule as schedule_lib
from esolm_jax.sampling.schedule import Schedule


@flax.struct.dataclass
class Passes:
    """Tables of the passes, all int32; a pytree, so that the decoding loop takes it as it is.

    Attributes:
      order: [B, L]; rank: [L], the rank of each slot unless it lies below `bidirectional_below`.
        (`padded` makes both longer.)
      start, first, size, end, bidirectional_below: [steps], slots as described above; slots below
        `bidirectional_below` are of rank 0.
      unknown: the token that stands for what is not known yet.
      shift: 0, or 1 where slot j holds text token j−1 and predicts token j (AR).
      start_token: what slot 0 holds when shift = 1.
    """

    order: np.ndarray
    rank: np.ndarray
    start: np.ndarray
    first: np.ndarray
    size: np.ndarray
    end: np.ndarray
    bidirectional_below: np.ndarray
    unknown: int = flax.struct.field(pytree_node=False)
    shift: int = flax.struct.field(pytree_node=False, default=0)
    start_token: int = flax.struct.field(pytree_node=False, default=0)

    def padded(self, margin: int) -> Self:
        """With `margin` more slots in `order` and `rank`, so that every window lies inside."""
        order = np.pad(self.order, ((0, 0), (0, margin)))
        return self.replace(order=order, rank=np.pad(self.rank, (0, margin)))

    def segments(self) -> list[tuple[int, int, int]]:
        """Runs of passes (from, to, width) that share one compiled width.

        Two at most: up to the last wide pass, and the narrow passes after it (two slots: the
        token of the last pass and the mask of this).
        """
        width = self.end - self.start
        wide = np.nonzero(width > 2)[0]
        cut = int(wide[-1]) + 1 if wide.size else 0
        runs = [(0, cut), (cut, len(width))]
        return [(a, b, int(width[a:b].max())) for a, b in runs if b > a]


def _tables(order, step_sizes, *, start, end, rank, bidirectional_below, **rest) -> Passes:
    first = np.cumsum(step_sizes) - step_sizes
    start, first, size, end, below = (
        np.broadcast_to(a, first.shape).astype(np.int32)
        for a in (start, first, step_sizes, end, bidirectional_below)
    )
    return Passes(
        order.astype(np.int32), rank.astype(np.int32), start, first, size, end, below, **rest
    )


def _last_pass(step_sizes: np.ndarray):
    """First slot that the pass before generated: where the new context begins."""
    first = np.cumsum(step_sizes) - step_sizes
    return np.concatenate([[0], first[:-1]]).astype(np.int64)


def ar(order: np.ndarray, step_sizes: np.ndarray, *, mask_id: int, start_token: int) -> Passes:
    """One token per pass, each fed to predict the next; the order is the identity."""
    slot = np.arange(order.shape[1])
    if (order != slot).any() or (step_sizes != 1).any():
        raise UserError("objective ar generates in text order, one token per step")
    return _tables(
        order,
        step_sizes,
        start=slot,
        end=slot + 1,
        rank=slot,
        bidirectional_below=0,
        unknown=mask_id,
        shift=1,
        start_token=start_token,
    )


def eso_b(order: np.ndarray, step_sizes: np.ndarray, *, mask_id: int) -> Passes:
    """Each pass holds what the last one generated (as context) and its own masks."""
    schedule_lib.check(order, step_sizes)
    rank = np.arange(order.shape[1])
    return _tables(
        order,
        step_sizes,
        start=_last_pass(step_sizes),
        end=np.cumsum(step_sizes),
        rank=rank,
        bidirectional_below=0,
        unknown=mask_id,
    )


def mdlm(order: np.ndarray, step_sizes: np.ndarray, *, mask_id: int) -> Passes:
    """Every pass runs the whole canvas, and nothing of the cache outlives it."""
    length = order.shape[1]
    return _tables(
        order,
        step_sizes,
        start=0,
        end=length,
        rank=np.zeros(length),
        bidirectional_below=0,
        unknown=mask_id,
    )


def bd3(order: np.ndarray, step_sizes: np.ndarray, *, mask_id: int, block_length: int) -> Passes:
    """A block is one rank: its passes run it whole; the first also caches the block before."""
    block = (np.cumsum(step_sizes) - step_sizes) // block_length
    if (np.cumsum(step_sizes) > (block + 1) * block_length).any():
        raise UserError(f"step_sizes: no step may cross a block of block_length={block_length}")
    new_block = np.diff(block, prepend=0) > 0
    start = (block - new_block) * block_length
    rank = np.arange(order.shape[1]) // block_length
    return _tables(
        order,
        step_sizes,
        start=start,
        end=(block + 1) * block_length,
        rank=rank,
        bidirectional_below=0,
        unknown=mask_id,
    )


def eso_a(order: np.ndarray, step_sizes: np.ndarray, *, mask_id: int, num_diffusion: int) -> Passes:
    """Diffusion: known tokens see each other, so each pass runs them all again. Sequential: the
    diffusion tokens are cached by one pass, then as (B)."""
    first = np.cumsum(step_sizes) - step_sizes
    cached = first > num_diffusion  # the prefix is in the cache, with its final ranks
    start = np.where(cached, _last_pass(step_sizes), 0)
    return _tables(
        order,
        step_sizes,
        start=start,
        end=np.cumsum(step_sizes),
        rank=np.arange(order.shape[1]),
        bidirectional_below=np.minimum(first, num_diffusion),
        unknown=mask_id,
    )


def plan(config, schedule: Schedule, *, mask_id: int, start_token: int) -> Passes:
    """The passes of `config.objective` for a schedule; `schedule.check` must hold.

    Reads objective and block_length.
    """
    order, sizes = schedule.order, schedule.step_sizes
    schedule_lib.check(order, sizes)
    match config.objective:
        case "ar":
            return ar(order, sizes, mask_id=mask_id, start_token=start_token)
        case "mdlm":
            return mdlm(order, sizes, mask_id=mask_id)
        case "bd3":
            return bd3(order, sizes, mask_id=mask_id, block_length=config.block_length)
        case "eso_a":
            return eso_a(order, sizes, mask_id=mask_id, num_diffusion=schedule.num_diffusion)
        case "eso_b":
            return eso_b(order, sizes, mask_id=mask_id)
