"""The decoding loop: one jitted program for each phase over an explicit KV cache, for every family.

Known tokens, the cache and the tables of the passes go in; what a pass does is read off the tables
(see passes.py), so the loop knows no family.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from esolm_jax.parallel import sharding
from esolm_jax.process import prng
from esolm_jax.sampling.engine import cache as cache_lib
from esolm_jax.sampling.engine import network as network_lib
from esolm_jax.sampling.engine.cache import Cache
from esolm_jax.sampling.engine.choose import precomputed_gumbel
from esolm_jax.sampling.engine.network import Network, Window
from esolm_jax.sampling.plan.passes import NEVER, DecodePlan


@flax.struct.dataclass
class State:
    """What a pass hands to the next; S slots, with a margin for the widest window.

    Attributes:
      known: int32 [B, S + 1], the tokens in generation order (behind the start token if AR).
      cache: Cache of S slots, or None where no pass reads one.
      revealed: int32 [B, S], the pass that generated a slot; −1 where it was given.
      eos_position: int32 [B], the position of the first EOS that was generated so far.
      next: int32, the pass to come.
      logits: float32 [B, S, V] at each rank when it was generated, or None.
    """

    known: jax.Array
    cache: Cache | None
    revealed: jax.Array
    eos_position: jax.Array
    next: jax.Array
    logits: jax.Array | None


@flax.struct.dataclass
class Decoded:
    """What was generated, in text order.

    Attributes:
      text: int32 [B, L].
      revealed: int32 [B, L], the pass (counting the prompt's) that generated each token; −1 =
        given, NEVER = not generated, because the text had ended.
      eos_position: int32 [B], the position of the first EOS, or NEVER.
      passes: int32, how many passes were run, those of the prompt included.
      logits: float32 [B, L, V] by rank, or None.
    """

    text: jax.Array
    revealed: jax.Array
    eos_position: jax.Array
    passes: jax.Array
    logits: jax.Array | None


def _window(passes: DecodePlan, state: State, i, width: int, picked: int):
    """What pass i runs, in `width` slots of each row, with logits of `picked` of them."""
    start, first = passes.start[i], passes.first[i]
    slot = start[:, None] + jnp.arange(width)[None]
    position, token = (jnp.take_along_axis(a, slot, axis=1) for a in (passes.order, state.known))
    rank = jnp.where(slot < passes.bidirectional_below[i][:, None], 0, passes.rank[slot])
    rank = jnp.where(slot < passes.end[i][:, None], rank, NEVER)
    token = jnp.where(slot < first[:, None] + passes.shift, token, passes.unknown)
    pick = (first - start)[:, None] + jnp.arange(picked)[None]
    return Window(
        token=token,
        position=position,
        rank=rank,
        in_context=jnp.ones_like(rank, bool),
        filled=start,
        pick=jnp.minimum(pick, width - 1),
    )


def put(array, new, at, keep):
    """Writes the kept columns of new [B, P, …] to array [B, S, …] at [b, at[b, p]]."""
    at = jnp.where(keep, at, array.shape[1])
    return jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(array, at, new)


def _widened(array, width: int, axis: int):
    pad = [(0, 0)] * array.ndim
    pad[axis] = (0, width - array.shape[axis])
    return jnp.pad(array, pad)


def _run_shape(network, passes, state, i, *, noise, choice, shape, widest):
    """(tokens [B, P], logits, keys, values) of pass i run in one shape, widened to the widest.
    `noise`: of slots [B, P], as of choose.noise_of."""
    width, picked = shape
    window = _window(passes, state, i, width, picked)
    logits, keys, values = network_lib.forward(network, window, state.cache)
    chosen = None
    if picked:
        position = jnp.take_along_axis(window.position, window.pick, axis=1)
        slot = window.filled[:, None] + window.pick
        chosen = _widened(choice(logits, position, noise(slot)), widest[1], 1)
        logits = _widened(logits, widest[1], 1)
    if state.cache is None:
        keys = values = ()
    return (
        chosen,
        logits if state.logits is not None else None,
        *jax.tree.map(lambda a: _widened(a, widest[0], 2), (keys, values)),
    )


@functools.partial(
    jax.jit,
    static_argnames=("choice", "shapes", "aligned", "eos_id"),
    donate_argnames="state",
)
def run(network, passes, index, state, row_keys, high, *, choice, shapes, aligned, eos_id):
    """Passes up to high − 1, each in its one of the `shapes`; ends when every text has ended."""
    widest = tuple(map(max, zip(*shapes, strict=True)))
    slot, first, last = jnp.arange(passes.order.shape[1]), state.next, high - 1
    is_wanted = (first <= last) & (slot >= passes.first[first].min())
    is_wanted &= slot < (passes.first[last] + passes.size[last]).max()
    noise = precomputed_gumbel(row_keys, passes.order, is_wanted, network.config.vocab_size)

    def body_fn(state):
        i = state.next
        common = {"noise": noise, "choice": choice, "widest": widest}
        branches = [functools.partial(_run_shape, shape=shape, **common) for shape in shapes]
        args = network, passes, state, i
        found = jax.lax.switch(index[i], branches, *args) if len(shapes) > 1 else branches[0](*args)
        chosen, logits, keys, values = found
        if chosen is not None:
            slot = passes.first[i][:, None] + jnp.arange(widest[1])[None]
            keep = jnp.arange(widest[1])[None] < passes.size[i][:, None]
            state = _reveal(state, passes, i, slot, keep, chosen, logits, eos_id)
        if state.cache is not None:
            after = keys[-1][:, 0, 0, 0] > jnp.inf if chosen is None else chosen
            cache = cache_lib.write(
                state.cache, keys, values, passes.start[i], after.astype(jnp.int32), aligned=aligned
            )
            state = state.replace(cache=cache)
        return state.replace(next=i + 1)

    def cond_fn(state):
        left = passes.leftmost_unknown[state.next]
        ended = (left == NEVER) | (state.eos_position < left)
        return (state.next < high) & ~ended.all()

    return jax.lax.while_loop(cond_fn, body_fn, state)


def _reveal(state: State, passes, i, slot, keep, chosen, logits, eos_id) -> State:
    eos_position = state.eos_position
    if eos_id is not None:
        position = jnp.take_along_axis(passes.order, slot, axis=1)
        is_end = keep & (chosen == eos_id) & (position > last_given(passes))
        at = jnp.where(is_end, position, NEVER)
        eos_position = jnp.minimum(eos_position, at.min(axis=1))
    if state.logits is not None:
        state = state.replace(logits=put(state.logits, logits, slot, keep))
    return state.replace(
        known=put(state.known, chosen, slot + passes.shift, keep),
        revealed=put(state.revealed, jnp.broadcast_to(i, slot.shape), slot, keep),
        eos_position=eos_position,
    )


def last_given(passes: DecodePlan):
    """int32 [B, 1]: the last given position, −1 for none; an EOS before it does not end a text."""
    is_given = jnp.arange(passes.order.shape[1])[None] < passes.given[:, None]
    return jnp.where(is_given, passes.order, -1).max(axis=1, keepdims=True)


def row_keys(seeds) -> jax.Array:
    """One key per row, which depends only on its Seed."""
    batch, row = (np.array([getattr(s, n) for s in seeds], np.uint32) for n in ("batch", "row"))
    return _row_keys(batch, row)


@jax.jit
@jax.vmap
def _row_keys(batch, row):
    return jax.random.fold_in(prng.key(batch), row)


def start_state(network: Network, passes: DecodePlan, margin: int, mesh, *, with_logits, cached):
    """The state before the first pass. `passes` are not padded."""
    batch, length = passes.order.shape
    config, slots = network.config, length + margin
    known = np.full((batch, slots + 1), passes.start_token, np.int32)
    known[:, passes.shift : passes.shift + length] = passes.known
    is_given = np.arange(slots)[None] < passes.given[:, None]
    empty = functools.partial(cache_lib.empty_cache, config, batch, slots, mesh)
    by_row = {  # NumPy: a program takes it at once, where jnp would run one for each
        "known": known,
        "revealed": np.where(is_given, -1, NEVER).astype(np.int32),
        "eos_position": np.full(batch, NEVER, np.int32),
        "logits": jnp.zeros((batch, slots, config.vocab_size)) if with_logits else None,
    }
    cache = empty() if cached else None
    return State(cache=cache, next=np.int32(0), **over_rows(mesh, by_row))


def over_rows(mesh: Mesh | None, by_row):
    """Arrays [B, …] on the mesh, on each device those of its rows; without a mesh, as they are."""
    return by_row if mesh is None else jax.device_put(by_row, sharding.rows(mesh))


def decode(
    network: Network,
    passes: DecodePlan,
    choice,
    keys,
    *,
    mesh: Mesh | None = None,
    eos_id: int | None = None,
    with_logits: bool = False,
    dry_run: bool = False,
) -> Decoded:
    """Runs all passes.

    Args:
      network: of network.fold, on the mesh.
      passes: tables for B rows; see passes.py.
      choice: Choice, or any hashable callable of the same form.
      keys: one for each row, of row_keys.
      mesh: None = one device. B must divide by its row shards.
      eos_id: if not None, a text ends at its first generated EOS after all given tokens, once
        all tokens before it are known; the loop ends with the last text.
      with_logits: also return the logits each token was drawn from (mask token not excluded).
      dry_run: compile, but run no pass.
    """
    keys = over_rows(mesh, keys)
    _, state = _run_segments(
        network, passes, keys, passes.segments(), choice, margin=0, mesh=mesh, eos_id=eos_id,
        cached=bool(passes.start.max(initial=0)), with_logits=with_logits, dry_run=dry_run,
    )  # fmt: skip
    return in_text_order(state, passes)


def prefill(network: Network, passes: DecodePlan, keys, *, margin: int, mesh, dry_run: bool):
    """(tables padded by at least `margin` slots, state with a cache) behind the passes of the
    prompt; for loops that find the order or the steps of the rest themselves."""
    segments = passes.segments()[:1] if passes.prompt_passes else []
    return _run_segments(
        network, passes, keys, segments, None, margin=margin, mesh=mesh, eos_id=None, cached=True,
        with_logits=False, dry_run=dry_run,
    )  # fmt: skip


def _run_segments(
    network, passes, keys, segments, choice, *, margin, mesh, eos_id, cached, with_logits, dry_run
):
    """(padded tables, state) after these segments from the start, one program for each."""
    shape_buckets = [passes.shape_buckets(*segment) for segment in segments]
    length = passes.order.shape[1]
    slots = length + margin
    for (low, high), (_, shapes) in zip(segments, shape_buckets, strict=True):
        slots = max(slots, int(passes.start[low:high].max()) + max(width for width, _ in shapes))
    margin = cache_lib.round_up(slots) - length  # of plans alike, the same
    state = start_state(network, passes, margin, mesh, with_logits=with_logits, cached=cached)
    tables = passes.padded(margin)
    tables = tables.replace(**over_rows(mesh, {"order": tables.order, "known": tables.known}))
    for (_, high), (index, shapes) in zip(segments, shape_buckets, strict=True):
        state = run(
            network, tables, index, state, keys, 0 if dry_run else high,
            choice=choice, shapes=shapes, aligned=passes.aligned, eos_id=eos_id,
        )  # fmt: skip
    return tables, state


@jax.jit
def unpermute(order, *by_rank):
    """Of each, its first L from by rank to by position in the text: [B, L] by `order` [B, L]."""
    parts = [array[:, : order.shape[1]] for array in by_rank]
    return [jnp.put_along_axis(jnp.zeros_like(a), order, a, axis=1, inplace=False) for a in parts]


def in_text_order(state: State, passes: DecodePlan) -> Decoded:
    length = passes.order.shape[1]
    known = state.known[:, passes.shift :] if passes.shift else state.known
    text, revealed = unpermute(passes.order, known, state.revealed)
    return Decoded(
        text=text,
        revealed=revealed,
        eos_position=state.eos_position,
        passes=state.next,
        logits=None if state.logits is None else state.logits[:, :length],
    )
