"""SDAR's sampling: block diffusion with a cache. Each pass runs one block of every row.

A pass reveals a fixed number of masks of the block, the most confident or the leftmost ones, or
all above a threshold if they are more. One more pass over the finished block stores it in the
cache. The published code overwrites visible tokens where a block has fewer masks than a pass
reveals; this one does not.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.sampling.engine import network as network_lib
from esolm_jax.sampling.engine.cache import KVCache
from esolm_jax.sampling.engine.choose import at_temperature, top_k_then_top_p
from esolm_jax.sampling.engine.network import Network, Window
from esolm_jax.sampling.loops import reveal
from esolm_jax.sampling.loops.loop import (
    Decoded,
    Jitted,
    Loop,
    Program,
    Task,
    over_rows,
    scatter_columns,
)
from esolm_jax.sampling.loops.noise import KeyedNoise, Noise, PassNoise
from esolm_jax.sampling.loops.run_passes import State, prefill
from esolm_jax.sampling.loops.whole_text import Ending, Progress, ended, known_by_position
from esolm_jax.sampling.plan.passes import NEVER

ORDERS = ("confidence", "left_to_right")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a pass over a block reveals. Hashable.

    Attributes:
      block_length: tokens of a block, counted from the start of the text.
      steps: passes that reveal a block; 0 = one for each of its tokens.
      order: one of ORDERS.
      threshold: above 0, all masks with a higher confidence become known, if they are at least as
        many as the pass would reveal otherwise.
      temperature: 0 = greedy, with the confidence at temperature 1. top_k: 0 = off. top_p: 1 = off;
        applied after top_k.
    """

    block_length: int
    steps: int = 0
    order: str = "confidence"
    threshold: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def num_steps(self) -> int:
        return self.steps or self.block_length

    def counts(self) -> np.ndarray:
        """int32 [steps + 1]: masks that each pass over a block reveals; the last one stores it."""
        whole, more = divmod(self.block_length, self.num_steps)
        return np.array([whole + (i < more) for i in range(self.num_steps)] + [0], np.int32)

    def choose(self, count_B, logits_BWV, is_masked_BW, noise: PassNoise):
        """(tokens int32 [B, W], bool [B, W]: which of the masks take theirs)."""
        logits = at_temperature(logits_BWV, self.temperature) if self.temperature else logits_BWV
        logits = top_k_then_top_p(logits, self.top_k, self.top_p)
        token, score, _ = reveal.draw(logits, noise.tokens() if self.temperature else None)
        if self.order == "left_to_right":
            return token, reveal.first(is_masked_BW, count_B)
        chosen = reveal.best(score, is_masked_BW, count_B)
        if not self.threshold:
            return token, chosen
        sure = is_masked_BW & (score > self.threshold)
        return token, jnp.where((sure.sum(axis=1) >= count_B)[:, None], sure, chosen)


@dataclasses.dataclass(frozen=True)
class SDAR(Loop):
    """Generates the unknown tokens of a plan, block by block.

    Attributes:
      task: see Task; its plan is of bd3, with the blocks of the rule. Of its order, only that of
        the known tokens matters. Its sampler is not used. A text ends with the block of its first
        EOS.
      noise: by default KeyedNoise of the task's keys.
    """

    task: Task
    rule: Rule
    noise: Noise | None = None

    @property
    def decides_order(self) -> bool:
        return True

    def start(self, network: Network) -> tuple[State, list[Program]]:
        task, block = self.task, self.rule.block_length
        state, _, programs = prefill(network, task, margin=block)
        known, text = known_by_position(task)
        by_row = {"known": known, "text": text}
        settings = Settings(
            **over_rows(task.mesh, by_row),
            filled=over_rows(task.mesh, (task.plan.num_known // block * block).astype(np.int32)),
            length=task.plan.length.astype(np.int32),
            counts=self.rule.counts(),
            noise=self.noise or KeyedNoise(over_rows(task.mesh, task.row_keys)),
            rule=self.rule,
            mask=task.plan.unknown,
            eos=task.eos_id,
        )
        last = Program(_finish, Ending(known, eos=task.eos_id))
        return state, [*programs, Program(_run, settings), last]


@flax.struct.dataclass
class Settings:
    """Inputs common to all passes.

    Attributes:
      known, text: bool and int32 [B, L], by position, at the start; the mask where none is known.
      filled: int32 [B], tokens in whole known blocks. length: int32 [B]. counts: as of Rule.counts.
      mask, eos: tokens; eos may be None. rule, noise: of the loop.
    """

    known: jax.Array
    text: jax.Array
    filled: jax.Array
    length: jax.Array
    counts: jax.Array
    noise: Any
    rule: Rule = flax.struct.field(pytree_node=False)
    mask: int = flax.struct.field(pytree_node=False)
    eos: int | None = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Blocks:
    """The state carried from pass to pass.

    Attributes:
      progress: see whole_text.Progress.
      cache: of the blocks before the current one.
      filled: int32 [B], the start of the row's current block; at least `length` when it has ended.
      step: int32 [B], passes over the current block so far.
    """

    progress: Progress
    cache: KVCache
    filled: jax.Array
    step: jax.Array


def _block(blocks: Blocks, settings: Settings) -> tuple[Window, jax.Array]:
    """The current block of each row, and which of its tokens are masked."""
    length = settings.text.shape[1]
    position = blocks.filled[:, None] + jnp.arange(settings.rule.block_length)[None]
    is_real = position < settings.length[:, None]
    inside = jnp.minimum(position, length - 1)
    text, revealed_at = (
        jnp.take_along_axis(a, inside, axis=1)
        for a in (blocks.progress.text, blocks.progress.revealed_at)
    )
    window = Window(
        token=text,
        position=position,
        rank=jnp.where(is_real, 0, NEVER),
        in_context=jnp.ones_like(is_real),
        filled=blocks.filled,
        pick=jnp.broadcast_to(jnp.arange(position.shape[1])[None], position.shape),
    )
    return window, is_real & (revealed_at == NEVER)


def _after(blocks: Blocks, settings: Settings, window: Window, is_stored) -> tuple:
    """`filled` and `step` of the next pass: rows whose block is stored begin the next block, or
    end at an EOS."""
    filled = blocks.filled + jnp.where(is_stored, settings.rule.block_length, 0)
    if settings.eos is not None:
        inside = jnp.minimum(window.position, settings.text.shape[1] - 1)
        given = jnp.take_along_axis(settings.known, inside, axis=1)
        is_end = (window.token == settings.eos) & ~given & (window.rank == 0)
        filled = jnp.where(is_stored & is_end.any(axis=1), settings.length, filled)
    return filled, jnp.where(is_stored, 0, blocks.step + 1)


@Jitted
def _run(network: Network, state: State, settings: Settings) -> Blocks:
    rule = settings.rule

    def body_fn(blocks: Blocks) -> Blocks:
        window, masked = _block(blocks, settings)
        logits, entries = network_lib.forward(network, window, blocks.cache)
        p = blocks.progress
        noise = PassNoise(settings.noise, p.pass_index, window.position, network.config.vocab_size)
        is_stored = ~masked.any(axis=1) | (blocks.step >= rule.num_steps)
        count = settings.counts[jnp.minimum(blocks.step, rule.num_steps)]
        token, chosen = rule.choose(count, logits, masked, noise)
        revealed = chosen & masked & ~is_stored[:, None] & (token != settings.mask)
        at = jnp.broadcast_to(p.pass_index, token.shape)
        filled, step = _after(blocks, settings, window, is_stored)
        progress = Progress(
            text=scatter_columns(p.text, token, window.position, revealed),
            revealed_at=scatter_columns(p.revealed_at, at, window.position, revealed),
            pass_index=p.pass_index + 1,
        )
        return Blocks(progress, blocks.cache.write(entries, blocks.filled), filled, step)

    def cond_fn(blocks: Blocks):
        return (blocks.filled < settings.length).any()

    revealed_at = jnp.where(settings.known, -1, NEVER)
    progress = Progress(settings.text, revealed_at, state.pass_index)
    first = Blocks(progress, state.cache, settings.filled, jnp.zeros_like(settings.filled))
    return jax.lax.while_loop(cond_fn, body_fn, first)


@jax.jit
def _finish(network: Network, blocks: Blocks, ending: Ending) -> Decoded:
    return ended(blocks.progress, ending)
