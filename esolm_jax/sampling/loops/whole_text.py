"""Loops of published masked diffusion models: every pass runs the whole text.

A rule draws a token for every position and says which masks become known; see llada.py, dream.py.
A text whose rule draws the mask token may keep masks, as with the published code.
"""

import dataclasses
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.sampling.engine import caches
from esolm_jax.sampling.engine import network as network_lib
from esolm_jax.sampling.engine.cache import KVCache
from esolm_jax.sampling.engine.network import Network, Window
from esolm_jax.sampling.loops.loop import Decoded, Jitted, Loop, Program, Task, over_rows
from esolm_jax.sampling.loops.noise import KeyedNoise, Noise, PassNoise
from esolm_jax.sampling.plan.passes import NEVER


class Rule(Protocol):
    """What a pass reveals. Hashable: a static argument of the jitted loop.

    Attributes:
      guidance: g of classifier-free guidance: logits u + (g + 1)(l − u), where u does not see the
        tokens that were known at the start; 0 = none.
    """

    guidance: float

    def tables(self, known: np.ndarray, length: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays [passes, B] by name, of the tokens that are known at the start, bool [B, L], and
        the tokens of each text, [B]. UserError: the steps do not fit."""
        ...

    def choose(self, row: dict, logits_BLV, is_masked_BL, noise: PassNoise):
        """(tokens int32 [B, L], bool [B, L]: which of the masks take theirs). `row`: the tables'
        entries of this pass, [B] each."""
        ...


@dataclasses.dataclass(frozen=True)
class WholeText(Loop):
    """Generates the unknown tokens of a plan by a rule.

    Attributes:
      task: see Task; its plan is of a family with one rank for the whole text. Of its order, only
        that of the known tokens matters. Its sampler is not used.
      predicts_next: as of Family.
      noise: by default KeyedNoise of the task's keys.
    """

    task: Task
    rule: Rule
    predicts_next: bool = False
    noise: Noise | None = None

    @property
    def decides_order(self) -> bool:
        return True

    def start(self, network: Network) -> tuple["Progress", list[Program]]:
        task = self.task
        known, text = known_by_position(task)
        tables = self.rule.tables(known, task.plan.length)
        progress = Progress(
            **over_rows(
                task.mesh,
                {"text": text, "revealed_at": np.where(known, -1, NEVER).astype(np.int32)},
            ),
            pass_index=np.int32(0),
        )
        settings = Settings(
            **over_rows(task.mesh, {"known": known}),
            length=task.plan.length.astype(np.int32),
            tables=tables,
            noise=self.noise or KeyedNoise(over_rows(task.mesh, task.row_keys)),
            cache=caches.no_cache(task.mesh),
            rule=self.rule,
            predicts_next=self.predicts_next,
            mask=task.plan.unknown,
        )
        last = Ending(known, eos=task.eos_id)
        return progress, [Program(_run, settings), Program(_finish, last)]


def known_by_position(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """(bool [B, L]: known positions, int32 [B, L]: their tokens, the mask elsewhere)."""
    plan = task.plan
    by_rank = np.arange(plan.order.shape[1])[None] < plan.num_known[:, None]
    known, text = np.zeros_like(by_rank), np.zeros_like(plan.known)
    np.put_along_axis(known, plan.order, by_rank, axis=1)
    np.put_along_axis(text, plan.order, plan.known, axis=1)
    return known, np.where(known, text, plan.unknown).astype(np.int32)


@flax.struct.dataclass
class Progress:
    """The state carried from pass to pass.

    Attributes:
      text: int32 [B, L], the mask where nothing is known.
      revealed_at: int32 [B, L], the pass that revealed a token; −1 = known, NEVER = masked.
      pass_index: int32, the next pass.
    """

    text: jax.Array
    revealed_at: jax.Array
    pass_index: jax.Array


@flax.struct.dataclass
class Settings:
    """Inputs common to all passes.

    Attributes:
      known: bool [B, L], at the start. length: int32 [B]. tables: as of Rule.tables.
      cache: without slots. mask: the token that stands for unknown ones.
      rule, noise, predicts_next: of the loop.
    """

    known: jax.Array
    length: jax.Array
    tables: dict[str, jax.Array]
    noise: Any
    cache: KVCache
    rule: Rule = flax.struct.field(pytree_node=False)
    predicts_next: bool = flax.struct.field(pytree_node=False)
    mask: int = flax.struct.field(pytree_node=False)


def _logits(network: Network, text, settings: Settings):
    """float32 [B, L, V]: what predicts each position, without guidance."""
    position = jnp.broadcast_to(jnp.arange(text.shape[1])[None], text.shape)
    rank = jnp.where(position < settings.length[:, None], 0, NEVER)
    window = Window(
        token=text,
        position=position,
        rank=rank,
        in_context=jnp.ones_like(rank, bool),
        filled=jnp.zeros(len(text), jnp.int32),
        pick=jnp.maximum(position - settings.predicts_next, 0),
    )
    return network_lib.forward(network, window, settings.cache)[0]


def _guided_logits(network: Network, text, settings: Settings):
    logits, guidance = _logits(network, text, settings), settings.rule.guidance
    if not guidance:
        return logits
    blind = _logits(network, jnp.where(settings.known, settings.mask, text), settings)
    return blind + (guidance + 1) * (logits - blind)


@Jitted
def _run(network: Network, state: Progress, settings: Settings) -> Progress:
    length = state.text.shape[1]
    position = jnp.broadcast_to(jnp.arange(length)[None], state.text.shape)
    passes = len(next(iter(settings.tables.values())))

    def is_masked(p: Progress):
        return (p.revealed_at == NEVER) & (position < settings.length[:, None])

    def body_fn(p: Progress) -> Progress:
        logits = _guided_logits(network, p.text, settings)
        row = {name: table[p.pass_index] for name, table in settings.tables.items()}
        noise = PassNoise(settings.noise, p.pass_index, position, network.config.vocab_size)
        masked = is_masked(p)
        token, chosen = settings.rule.choose(row, logits, masked, noise)
        revealed = chosen & masked & (token != settings.mask)
        return Progress(
            text=jnp.where(revealed, token, p.text),
            revealed_at=jnp.where(revealed, p.pass_index, p.revealed_at),
            pass_index=p.pass_index + 1,
        )

    def cond_fn(p: Progress):
        return (p.pass_index < passes) & is_masked(p).any()

    return jax.lax.while_loop(cond_fn, body_fn, state)


@flax.struct.dataclass
class Ending:
    """known: bool [B, L], at the start. eos: the token that ends a text, or None."""

    known: jax.Array
    eos: int | None = flax.struct.field(pytree_node=False)


@jax.jit
def _finish(network: Network, p: Progress, ending: Ending) -> Decoded:
    del network
    return ended(p, ending)


def ended(p: Progress, ending: Ending) -> Decoded:
    """The texts, each up to its first generated EOS behind all known tokens."""
    position = jnp.arange(p.text.shape[1])[None]
    eos_position = jnp.full(len(p.text), NEVER, jnp.int32)
    if ending.eos is not None:
        last_known = jnp.where(ending.known, position, -1).max(axis=1, keepdims=True)
        is_end = (p.text == ending.eos) & (position > last_known) & (p.revealed_at != NEVER)
        eos_position = jnp.where(is_end, position, NEVER).min(axis=1).astype(jnp.int32)
    return Decoded(
        text=p.text,
        revealed_at=p.revealed_at,
        eos_position=eos_position,
        passes=p.pass_index,
    )
