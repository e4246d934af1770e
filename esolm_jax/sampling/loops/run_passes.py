"""The passes of a decode plan: one jitted program for each segment, over an explicit KV cache.

Known tokens, the cache and the tables of the passes go in. The tables define each pass (see
plan/passes.py), so this file is independent of the family.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine import caches
from esolm_jax.sampling.engine import network as network_lib
from esolm_jax.sampling.engine.cache import KVCache
from esolm_jax.sampling.engine.choose import precomputed_gumbel
from esolm_jax.sampling.engine.network import Network, Window
from esolm_jax.sampling.loops.loop import (
    Jitted,
    Program,
    Sampler,
    Task,
    draw,
    first_eos,
    over_rows,
    pad_columns,
    scatter_columns,
)
from esolm_jax.sampling.plan.passes import NEVER, DecodePlan

# Tokens of all rows that take as long as one, because weights are read: FLOP/s over bytes/s.
FEW_TOKENS = {"gpu": 256, "tpu": 256}


@flax.struct.dataclass
class State:
    """The state carried from pass to pass; S slots, with a margin for the widest window.

    Attributes:
      known: int32 [B, S + 1], the tokens in generation order (behind the start token if AR).
      cache: of S slots, or no_cache() if no pass reads one.
      revealed_at: int32 [B, S], the pass that generated a slot; −1 = known from the start.
      eos_position: int32 [B], the position of the first EOS that was generated so far.
      pass_index: int32, the next pass.
      logits: float32 [B, S, V] at each rank when it was generated, or None.
      log_p: float32 [B, S], log-probability of each generated token, or None.
    """

    known: jax.Array
    cache: KVCache
    revealed_at: jax.Array
    eos_position: jax.Array
    pass_index: jax.Array
    logits: jax.Array | None
    log_p: jax.Array | None


@flax.struct.dataclass
class Segment:
    """A run of passes that share a program.

    Attributes:
      tables: the padded plan. row_keys: [B].
      shape_index: [rows of the tables], which of the `shapes` each pass runs in.
      stop: int32, the first pass after the segment.
      text: int32 [B, L], or None; see Task.
      shapes: (tokens of the window, tokens with logits), ascending.
      sampler, eos_id: as of Task.
    """

    tables: DecodePlan
    row_keys: jax.Array
    shape_index: np.ndarray
    stop: np.ndarray
    text: jax.Array | None
    shapes: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)
    sampler: Sampler | None = flax.struct.field(pytree_node=False)
    eos_id: int | None = flax.struct.field(pytree_node=False)

    @property
    def widest(self) -> tuple[int, int]:
        return tuple(map(max, zip(*self.shapes, strict=True)))


def _window(tables: DecodePlan, state: State, shape: tuple[int, int]) -> Window:
    """The window of the next pass; `shape`: (slots of each row, slots with logits)."""
    (width, picked), i = shape, state.pass_index
    start, first = tables.start[i], tables.first[i]
    slot = start[:, None] + jnp.arange(width)[None]
    position, token = (jnp.take_along_axis(a, slot, axis=1) for a in (tables.order, state.known))
    rank = jnp.where(slot < tables.bidirectional_below[i][:, None], 0, tables.rank[slot])
    rank = jnp.where(slot < tables.end[i][:, None], rank, NEVER)
    token = jnp.where(slot < first[:, None] + tables.shift, token, tables.unknown)
    pick = (first - start)[:, None] + jnp.arange(picked)[None]
    return Window(
        token=token,
        position=position,
        rank=rank,
        in_context=jnp.ones_like(rank, bool),
        filled=start,
        pick=jnp.minimum(pick, width - 1),
    )


def _run_shape(network, state: State, segment: Segment, noise, shape: tuple[int, int]):
    """(tokens [B, P], their log_p, logits, entries of the cache) of the next pass, run in one shape
    and padded to the widest. `noise`: slots [B, P] → noise, from choose.precomputed_gumbel."""
    width, picked = segment.widest
    window = _window(segment.tables, state, shape)
    logits, entries = network_lib.forward(network, window, state.cache)
    chosen = log_p = None
    if shape[1]:
        position = jnp.take_along_axis(window.position, window.pick, axis=1)
        slot = window.filled[:, None] + window.pick
        drawn = draw(segment.sampler, segment.text, logits, position, lambda: noise(slot))
        chosen, log_p, logits = (
            None if array is None else pad_columns(array, picked) for array in (*drawn, logits)
        )
    return chosen, log_p, None if state.logits is None else logits, entries.padded(width)


@Jitted
def run_passes(network: Network, state: State, segment: Segment) -> State:
    """The passes of a segment, each in its shape; ends when every text has ended."""
    tables, shapes, stop = segment.tables, segment.shapes, segment.stop
    slot, first, last = jnp.arange(tables.order.shape[1]), state.pass_index, stop - 1
    is_wanted = (first <= last) & (slot >= tables.first[first].min())
    is_wanted &= slot < (tables.first[last] + tables.size[last]).max()
    vocab_size = network.config.vocab_size
    noise = precomputed_gumbel(segment.row_keys, tables.order, is_wanted, vocab_size)

    def body_fn(state: State) -> State:
        i = state.pass_index
        branches = [
            lambda state, shape=shape: _run_shape(network, state, segment, noise, shape)
            for shape in shapes
        ]
        chosen, log_p, logits, entries = jax.lax.switch(segment.shape_index[i], branches, state)
        cache = state.cache.write(entries, tables.start[i])
        if chosen is not None:
            state = _reveal(state, segment, chosen, log_p, logits)
        return state.replace(cache=cache, pass_index=i + 1)

    def cond_fn(state: State):
        left = tables.leftmost_unknown[state.pass_index]
        ended = (left == NEVER) | (state.eos_position < left)
        return (state.pass_index < stop) & ~ended.all()

    return jax.lax.while_loop(cond_fn, body_fn, state)


def _reveal(state: State, segment: Segment, chosen_BP, log_p_BP, logits_BPV) -> State:
    """Puts the tokens of the pass in their slots."""
    tables, i = segment.tables, state.pass_index
    column = jnp.arange(chosen_BP.shape[1])[None]
    slot, keep = tables.first[i][:, None] + column, column < tables.size[i][:, None]
    eos_position = state.eos_position
    if segment.eos_id is not None:
        position = jnp.take_along_axis(tables.order, slot, axis=1)
        is_eos = keep & (chosen_BP == segment.eos_id)
        eos_position = jnp.minimum(eos_position, first_eos(tables, is_eos, position))
    if state.logits is not None:
        state = state.replace(logits=scatter_columns(state.logits, logits_BPV, slot, keep))
    if log_p_BP is not None:
        state = state.replace(log_p=scatter_columns(state.log_p, log_p_BP, slot, keep))
    revealed_at = jnp.broadcast_to(i, slot.shape)
    return state.replace(
        known=scatter_columns(state.known, chosen_BP, slot + tables.shift, keep),
        revealed_at=scatter_columns(state.revealed_at, revealed_at, slot, keep),
        eos_position=eos_position,
    )


def start_state(
    network: Network,
    task: Task,
    margin: int,
    *,
    cached: bool,
    aligned: bool,
    with_logits: bool = False,
) -> State:
    """The state before the first pass.

    Args:
      margin: slots beyond the length.
      aligned: all rows write to the same slots of the cache in every pass.
    """
    plan, config = task.plan, network.config
    batch, length = plan.order.shape
    slots = length + margin
    known = np.full((batch, slots + 1), plan.start_token, np.int32)
    known[:, plan.shift : plan.shift + length] = plan.known
    is_known = np.arange(slots)[None] < plan.num_known[:, None]
    by_row = {  # NumPy arrays: each jnp operation would compile a program
        "known": known,
        "revealed_at": np.where(is_known, -1, NEVER).astype(np.int32),
        "eos_position": np.full(batch, NEVER, np.int32),
        "logits": jnp.zeros((batch, slots, config.vocab_size)) if with_logits else None,
        "log_p": None if task.text is None else np.zeros((batch, slots), np.float32),
    }
    cache = caches.no_cache(task.mesh)
    if cached:
        cache = caches.empty_cache(
            config, batch, slots, task.mesh, aligned=aligned, dtype=task.cache_dtype
        )
    return State(cache=cache, pass_index=np.int32(0), **over_rows(task.mesh, by_row))


def segments_of(
    task: Task, limits: list[tuple[int, int]], margin: int = 0
) -> tuple[DecodePlan, int, list[Program]]:
    """(padded tables, slots beyond the length, programs) of these runs of passes [low, high).

    Args:
      margin: the least number of slots beyond the length.
    """
    plan = task.plan
    few_tokens = FEW_TOKENS.get(sharding.platform(task.mesh), 0)
    buckets = [plan.shape_buckets(*limit, few_tokens) for limit in limits]
    length = plan.order.shape[1]
    slots = length + margin
    for (low, high), (_, shapes) in zip(limits, buckets, strict=True):
        slots = max(slots, int(plan.start[low:high].max()) + max(width for width, _ in shapes))
    margin = caches.round_up(slots) - length  # equal for similar plans
    tables = plan.padded(margin)
    tables = tables.replace(**over_rows(task.mesh, {"order": tables.order, "known": tables.known}))
    row_keys, text = over_rows(task.mesh, (task.row_keys, task.text))

    def program(stop: int, index, shapes) -> Program:
        draws = any(picked for _, picked in shapes)  # else one program serves all samplers
        segment = Segment(
            tables=tables,
            row_keys=row_keys,
            shape_index=index,
            stop=np.int32(stop),
            text=text,
            shapes=shapes,
            sampler=task.sampler if draws else None,
            eos_id=task.eos_id if draws else None,
        )
        return Program(run_passes, segment)

    programs = [program(high, *bucket) for (_, high), bucket in zip(limits, buckets, strict=True)]
    return tables, margin, programs


def prefill(network: Network, task: Task, margin: int) -> tuple[State, DecodePlan, list[Program]]:
    """(state, tables padded by at least `margin` slots, programs of the prompt's passes), for loops
    that find the order or the steps of the rest themselves."""
    prompt = task.plan.segments()[:1] if task.plan.prompt_passes else []
    tables, margin, programs = segments_of(task, prompt, margin)
    aligned = len(task.plan.order) == 1
    state = start_state(network, task, margin, cached=True, aligned=aligned)
    return state, tables, programs
