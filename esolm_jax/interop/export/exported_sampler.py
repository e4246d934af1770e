"""The two-phase sampler as one function of arrays, to be traced once for all runtimes of StableHLO.

It runs the passes of shipped/schedule_esolm.py, which are inputs, so that α₀, T, the schedule, the
length, prompts, temperature, top-k and top-p are all options of one program. It uses the noise of
sampling/engine/choose.py, so the same seed gives the same texts as `sample`.

Passes come in three tables: those that read the prompt, the wide ones (the diffusion phase), and
the narrow ones. Dimensions: b rows, l tokens, n passes of a table, v its window, p tokens that a
pass generates at most.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from esolm_jax.interop.export.shipped import plain_transformer
from esolm_jax.interop.export.shipped.decode_loop import UNREAD
from esolm_jax.model.lm_head import exclude_mask_token
from esolm_jax.process import prng
from esolm_jax.sampling.engine import choose


class Table(NamedTuple):
    """passes: int32 [n, 5, b], start, first, size, end and below of schedule_esolm.Passes.
    window: int32 [v], 0, 1, …; picks: int32 [p], 0, 1, …"""

    passes: jax.Array
    window: jax.Array
    picks: jax.Array


class State(NamedTuple):
    """known: int32 [b, S], tokens by slot. keys, values: [b, S, G, K] of each block; () without a
    cache."""

    known: jax.Array
    keys: list
    values: list


def make(network: dict, s: dict):
    """sample(weights, keys uint32 [b, 2], temperature, top_k, top_p, text int32 [b, l] (−1 where
    unknown), order int32 [b, l], passes, window and picks of each table) → int32 [b, l].

    Args:
      network: the dict of plain.description.
      s: of sampling_plan.of_artefacts.
    """

    def sample(weights, keys, temperature, top_k, top_p, text, order, *tables):
        tables = [Table(*tables[i : i + 3]) for i in range(0, len(tables), 3)]
        (batch, length), shift = order.shape, s["shift"]
        slots = length + shift + sum(table.window.shape[0] for table in tables)
        rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
        by_rank = jnp.take_along_axis(text, order, axis=1)
        known = jnp.full((batch, slots), s["mask_id"], jnp.int32)
        known = known.at[:, :shift].set(s["start_token"])
        known = known.at[:, shift : shift + length].set(
            jnp.where(by_rank < 0, s["mask_id"], by_rank)
        )
        padded = jnp.zeros((batch, slots), jnp.int32).at[:, :length].set(order)
        pick = functools.partial(
            _pick,
            row_keys=prng.wrap(keys),
            temperature=temperature,
            filters=(top_k, top_p),
            mask_id=s["mask_id"],
        )
        forward = functools.partial(plain_transformer.forward, weights, network, xp=jnp)
        blocks, groups, head_width = s["cache"]
        # Each block has its own cache array, so that XLA updates it in place.
        shape = (batch, slots, groups, head_width)
        dtype = plain_transformer.cache_dtype({"qkv": weights["blocks.0.qkv"]})
        empty = [jnp.zeros(shape, dtype) for _ in range(blocks if s["has_step"] else 0)]
        state = State(known, empty, empty)
        for table in tables:
            body = functools.partial(
                _one_pass, table=table, s=s, order=padded, forward=forward, pick=pick
            )
            state = jax.lax.fori_loop(0, table.passes.shape[0], body, state)
        made = state.known[:, shift : shift + length]
        return jnp.zeros_like(order).at[rows, order].set(made)

    return sample


def _one_pass(i, state: State, *, table: Table, s: dict, order, forward, pick) -> State:
    """As run_passes of decode_loop.py."""
    known, shift = state.known, s["shift"]
    start, first, size, end, below = (table.passes[i, j][:, None] for j in range(5))
    slot = start + table.window[None]
    rank = jnp.where(slot < below, 0, slot // s["rank_block"])
    rank = jnp.where(slot < end, rank, UNREAD)
    token = jnp.where(
        slot < first + shift, jnp.take_along_axis(known, slot, axis=1), jnp.int32(s["mask_id"])
    )
    position = jnp.take_along_axis(order, slot, axis=1)
    column = table.picks[None]
    picked = jnp.minimum(first - start + column, table.window.shape[0] - 1)
    past = (state.keys, state.values, start[:, 0]) if s["has_step"] else None
    logits, keys, values = forward(
        token, position, rank, jnp.ones_like(slot, bool), past=past, pick=picked
    )
    chosen = pick(logits, jnp.take_along_axis(position, picked, axis=1))
    place = first + shift + column
    chosen = jnp.where(column < size, chosen, jnp.take_along_axis(known, place, axis=1))
    rows = jnp.arange(known.shape[0], dtype=jnp.int32)[:, None]
    known = known.at[rows, place].set(chosen)
    return State(known, keys, values) if s["has_step"] else State(known, [], [])


def _pick(logits, position, *, row_keys, temperature, filters, mask_id):
    """int32 [b, p], as TokenSampler of choose.py, with settings that are inputs."""
    logits = exclude_mask_token(logits, mask_id)
    drawn = filtered(logits, temperature, *filters)
    drawn = drawn + choose.gumbel(choose.keys_of(row_keys, position), logits.shape[-1])
    return choose.argmax(jnp.where(temperature > 0, drawn, logits), mask_id)


def filtered(logits, temperature, top_k, top_p):
    """Filters logits (without the mask) as TokenSampler does; temperature 0 counts as 1."""
    drawn = choose.at_temperature(logits, jnp.where(temperature > 0, temperature, 1.0))

    def apply(drawn):
        falling = -jnp.sort(-drawn, axis=-1)
        last = jnp.clip(top_k - 1, 0, drawn.shape[-1] - 1)
        kth = jax.lax.dynamic_slice_in_dim(falling, last, 1, axis=-1)
        kept = jnp.where((top_k == 0) | (drawn >= kth), drawn, -jnp.inf)
        return jnp.where(top_p < 1, choose.top_p_filter(kept, top_p), kept)

    return jax.lax.cond((top_k > 0) | (top_p < 1), apply, lambda drawn: drawn, drawn)
