"""The two-phase sampler as one function of arrays, to be traced once for all runtimes of StableHLO.

It uses the noise of sampling/engine/choose.py. Orders are an input; decode_loop.py draws them as
`sample` does, so the same seed gives the same texts as `sample`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from esolm_jax.interop.export.sampling_plan import Plan
from esolm_jax.interop.export.shipped import plain_transformer
from esolm_jax.model.lm_head import exclude_mask_token
from esolm_jax.process import prng
from esolm_jax.sampling.engine import choose


def make(network: dict, plan: Plan, *, top_k: int, top_p: float):
    """sample(weights, keys uint32 [b, 2], temperature, order int32 [b, L], num_diffusion [b]) →
    text int32 [b, L].

    Args:
      network: the dict of plain.description.
    """
    pick = functools.partial(_pick, mask_id=plan.about["mask_id"], top_k=top_k, top_p=top_p)
    run = _with_cache if plan.about["cached"] else _without_cache

    def sample(weights, keys, temperature, order, num_diffusion):
        row_keys = prng.wrap(keys)
        chosen = functools.partial(pick, row_keys=row_keys, temperature=temperature)
        forward = functools.partial(plain_transformer.forward, weights, network, xp=jnp)
        known = run(forward, plan, order, num_diffusion, chosen)
        shift, length = plan.about["shift"], plan.about["length"]
        by_rank = known[:, shift : shift + length]
        rows = jnp.arange(order.shape[0], dtype=jnp.int32)[:, None]
        return jnp.zeros_like(order).at[rows, order].set(by_rank)

    return sample


def _pick(logits, position, *, row_keys, temperature, mask_id, top_k, top_p):
    """int32 [b, P], as TokenSampler of choose.py, with a temperature that is an input."""
    logits = exclude_mask_token(logits, mask_id)
    drawn = filtered(logits, temperature, top_k=top_k, top_p=top_p)
    drawn = drawn + choose.gumbel(choose.keys_of(row_keys, position), logits.shape[-1])
    return choose.argmax(jnp.where(temperature > 0, drawn, logits), mask_id)


def filtered(logits, temperature, *, top_k, top_p):
    """Filters logits (without the mask) as TokenSampler does; temperature 0 counts as 1."""
    drawn = choose.at_temperature(logits, jnp.where(temperature > 0, temperature, 1.0))
    drawn = choose.keep_top_k(drawn, top_k) if top_k else drawn
    return choose.top_p_filter(drawn, top_p) if top_p < 1 else drawn


def _runs(plan: Plan):
    """(first slot, tokens of the pass before, tokens of a pass, passes) of runs of equal passes."""
    before = (plan.about["shift"], *plan.sizes[:-1])
    first = 0
    for (last, size), run in itertools.groupby(zip(before, plan.sizes, strict=True)):
        passes = len(list(run))
        yield first, last, size, passes
        first += size * passes


def _slots(start, width: int, batch):
    slot = start + jnp.arange(width, dtype=jnp.int32)
    return jnp.broadcast_to(slot[None], (batch, width))


def _with_cache(forward, plan: Plan, order, num_diffusion, pick):
    """Known tokens by slot. A pass runs the tokens of the last one and the masks of this one."""
    del num_diffusion
    about, (batch, length) = plan.about, order.shape
    blocks, groups, head_width = about["cache"]
    shift = about["shift"]

    def one_pass(n, state, run):
        known, keys, values = state
        start_of_run, last, size, _ = run
        first = start_of_run + n * size
        start, width = first - last + shift, last + size - shift
        slot = _slots(start, width, batch)
        logits, keys, values = forward(
            jax.lax.dynamic_slice_in_dim(known, start, width, axis=1),
            jax.lax.dynamic_slice_in_dim(order, start, width, axis=1),
            slot,
            jnp.ones_like(slot, bool),
            past=(keys, values, slot[:, 0]),
            pick=_slots(width - size, size, batch),
        )
        position = jax.lax.dynamic_slice_in_dim(order, first, size, axis=1)
        chosen = pick(logits, position)
        known = jax.lax.dynamic_update_slice_in_dim(known, chosen, first + shift, axis=1)
        return known, keys, values

    # Each block has its own cache array, so that XLA updates it in place.
    empty = [jnp.zeros((batch, length, groups, head_width)) for _ in range(blocks)]
    known = jnp.full((batch, length + shift), about["mask_id"], jnp.int32)
    state = known.at[:, :shift].set(about["start_token"]), empty, empty
    for run in _runs(plan):
        body = functools.partial(one_pass, run=run)
        state = jax.lax.fori_loop(jnp.int32(0), jnp.int32(run[3]), body, state)
    return state[0]


def _without_cache(forward, plan: Plan, order, num_diffusion, pick):
    """Known tokens by slot. Every pass runs the whole text, with masks where it is unknown."""
    about, (batch, length) = plan.about, order.shape
    slot = _slots(0, length, batch)

    def one_pass(n, known, run):
        start_of_run, _, size, _ = run
        first = start_of_run + n * size
        below = jnp.minimum(first, num_diffusion)[:, None] if about["prefix_of_one_rank"] else 0
        rank = jnp.where(slot < below, 0, slot // about["rank_block"])
        pick_slots = _slots(first, size, batch)
        logits, *_ = forward(known, order, rank, jnp.ones_like(slot, bool), pick=pick_slots)
        chosen = pick(logits, jnp.take_along_axis(order, pick_slots, axis=1))
        return jax.lax.dynamic_update_slice_in_dim(known, chosen, first, axis=1)

    known = jnp.full((batch, length), about["mask_id"], jnp.int32)
    for run in _runs(plan):
        body = functools.partial(one_pass, run=run)
        known = jax.lax.fori_loop(jnp.int32(0), jnp.int32(run[3]), body, known)
    return known
