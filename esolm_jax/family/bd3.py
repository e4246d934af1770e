"""BD3-LM: block diffusion. Two streams, rank = position // block length."""

import functools

import jax.numpy as jnp
import numpy as np

from esolm_jax.family.family import Export, Family, Windows, Work, one_block, refuse
from esolm_jax.family.labels import LabelledBatch
from esolm_jax.family.phase import Phase, PhaseSettings, diffusion_in_text_order
from esolm_jax.family.streams import index, labelled, stream, two_streams


def label(x, valid, masked, weight, *, mask: int, block_length: int) -> LabelledBatch:
    """z_t ‖ x, rank = position // block length; padding has a rank after all blocks."""
    order_BL = index(x)
    num_blocks = x.shape[1] // block_length
    rank = jnp.where(valid, order_BL // block_length, num_blocks)
    z = stream(jnp.where(masked, mask, x), order_BL, rank, in_context=False)
    tokens = two_streams(z, stream(x, order_BL, rank, in_context=True), block_length)
    return labelled(tokens, x, valid, order_BL, weight)


def phases(s: PhaseSettings) -> tuple[Phase, ...]:
    """One diffusion phase; each block of a row has its own time."""
    to_label = functools.partial(label, mask=s.special.mask, block_length=s.block_length)
    times = s.seq_len // s.block_length
    diffusion = functools.partial(diffusion_in_text_order, s, to_label, times_per_row=times)
    return (Phase("diffusion", 1.0, diffusion, s.mean_masked),)


def windows(schedule, block_length: int) -> Windows:
    """A block is one rank and each pass runs it whole; its first pass also caches the previous
    block."""
    first = schedule.first
    slot = np.arange(schedule.order.shape[1])
    refuse(
        (schedule.order // block_length != slot[None] // block_length).any(axis=1),
        "objective bd3 generates block by block: what is given must be the start of the text, or "
        f"lie in the first block (of block_length={block_length}) that is generated",
    )
    block = first // block_length
    inside = first + schedule.sizes <= (block + 1) * block_length
    refuse(
        ~(inside | (schedule.sizes == 0)).all(axis=0),
        f"step_sizes: no step may cross a block of block_length={block_length}",
    )
    whole = schedule.num_known // block_length
    new_block = np.diff(block, axis=0, prepend=whole[None]) > 0
    return Windows(
        prefill=whole * block_length,
        start=(block - new_block) * block_length,
        end=np.minimum((block + 1) * block_length, schedule.length[None]),
        rank=slot // block_length,
    )


def work(phase: Phase, length: int, alpha_0: float, block_length: int) -> Work:
    return Work(2 * length, length * phase.masked_fraction, length * (length + block_length))


FAMILY = Family(
    name="bd3",
    phases=phases,
    windows=windows,
    work=work,
    fixed_alpha_0=1.0,
    rank_span=one_block,
    order_span=one_block,
    schedules=("ancestral", "left_to_right", "blockwise"),
    replaced_schedules={"ancestral": "blockwise"},
    no_speculation="known tokens read later ones",
    export=Export(
        step_note="tokens of a block read each other: they may stay in the cache once the block is "
        "complete, and was run as it is then"
    ),
)
