"""Drafts of speculation: the tokens of a pass, the accepted drafts, and the new drafts.

The mathematics of speculative.py, without its loop.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.config import DRAFT_STYLES
from esolm_jax.sampling.engine import network as network_lib
from esolm_jax.sampling.engine.cache import Entries
from esolm_jax.sampling.engine.choose import TokenSampler, argmax, where_needed
from esolm_jax.sampling.engine.network import Window
from esolm_jax.sampling.loops.run_passes import State
from esolm_jax.sampling.plan.passes import NEVER, DecodePlan

CHAIN, STAIRCASE = DRAFT_STYLES


@flax.struct.dataclass
class Settings:
    """Inputs common to all passes.

    Attributes:
      tables: the padded plan. row_keys: [B]. length: int32 [B], tokens of each text.
      leftmost_unknown: int32 [B, L + 1], see passes.leftmost.
      sizes: k of the passes that are compiled, ascending; the last one is the largest.
      sampler, style, eos_id: settings of the loop.
    """

    tables: DecodePlan
    row_keys: jax.Array
    length: np.ndarray
    leftmost_unknown: np.ndarray
    sampler: TokenSampler = flax.struct.field(pytree_node=False)
    style: str = flax.struct.field(pytree_node=False)
    sizes: tuple[int, ...] = flax.struct.field(pytree_node=False)
    eos_id: int | None = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Noise:
    """Draws of all passes.

    Attributes:
      of_token, of_residual: slots [B, P] → Gumbel noise [B, P, V], for tokens and for tokens behind
        a rejected draft.
      log_u_BS: logarithms of uniform draws, for the test of drafts.
    """

    of_token: Callable
    of_residual: Callable
    log_u_BS: jax.Array


@flax.struct.dataclass
class Speculation:
    """The state carried from pass to pass.

    Attributes:
      state: as of run_passes; its tokens behind `num_final` are drafts.
      num_final: int32 [B], tokens that are final; all but the last of them are in the cache.
      filled: int32 [B], filled slots of the cache.
      drafted: int32 [B], drafts behind them. log_q: float32 [B, n, V], the log-probabilities that
        they were drawn from.
      draft_budget: int32 [B], how many tokens a pass may yield.
      proposed, accepted: int32 [B, n], how many drafts were tested at each distance behind the last
        final token, and accepted. (A draft behind a rejected one is not tested.)
    """

    state: State
    num_final: jax.Array
    filled: jax.Array
    drafted: jax.Array
    log_q: jax.Array
    draft_budget: jax.Array
    proposed: jax.Array
    accepted: jax.Array


def _labels(style: str, k: int, s: Speculation):
    """(slot, rank, in_context) [B, W] of a pass: k contexts, then the tokens that predict."""
    n = k - 1
    step = jnp.arange(k)[None]
    num_final, drafted = s.num_final[:, None], s.drafted[:, None]
    context = s.filled[:, None] + step
    is_real = context < num_final + drafted
    if style == CHAIN:
        query, mask = num_final + step[:, :n], num_final + drafted + step
        slot = jnp.concatenate([context, query, mask], axis=1)
        rank = jnp.concatenate([jnp.where(is_real, context, NEVER), query, mask], axis=1)
        in_context = [np.ones(k, bool), np.zeros(n, bool), np.ones(k, bool)]
    else:
        query = num_final + step
        # Of group a: behind `a` accepted drafts and the token after them.
        behind = query[:, :, None] + 1 + jnp.arange(n)[None, None]
        # Ranks k apart leave room for query copies that read the same context, not each other.
        apart = k * query[:, :, None] - 1 - jnp.arange(n)[None, None]
        batch = len(query)
        slot = jnp.concatenate([context, query, behind.reshape(batch, k * n)], axis=1)
        context = jnp.where(is_real, k * context, NEVER)
        rank = jnp.concatenate([context, k * query, apart.reshape(batch, k * n)], axis=1)
        in_context = [np.ones(k, bool), np.zeros(k + k * n, bool)]
    return slot, rank, jnp.asarray(np.concatenate(in_context))[None]


def _read(tables: DecodePlan, array, slot):
    """[B, W]: positions or tokens of these slots; behind the last slot, of the last."""
    return jnp.take_along_axis(array, jnp.minimum(slot, tables.order.shape[1] - 1), axis=1)


def predict(network, settings: Settings, s: Speculation, k: int) -> tuple[jax.Array, Entries]:
    """Runs a pass: logits [B, P, V] of the k tokens that are tested or drawn and, behind them, of
    drafts in groups of n (one group in a chain); and the entries of the k contexts."""
    tables = settings.tables
    slot, rank, in_context = _labels(settings.style, k, s)
    position, token = (_read(tables, a, slot) for a in (tables.order, s.state.known))
    is_context = jnp.arange(slot.shape[1])[None] < k
    width = slot.shape[1]
    window = Window(
        token=jnp.where(is_context, token, tables.unknown),
        position=position,
        rank=rank,
        in_context=in_context,
        filled=s.filled,
        pick=jnp.broadcast_to(jnp.arange(k, width)[None], (len(slot), width - k)),
    )
    logits, entries = network_lib.forward(network, window, s.state.cache)
    return logits, entries.first(k)


def _verify(s: Speculation, log_p, token, log_u):
    """(accepted [B], log p of the token after them [B, V], whether a draft was rejected, so that it
    is drawn with residual noise). `log_p` [B, k, V], `token` and the logarithms of uniform draws
    `log_u` [B, k]: from `num_final` on."""
    n, batch = token.shape[1] - 1, jnp.arange(len(token))
    column = jnp.arange(n)[None]
    is_draft = column < s.drafted[:, None]
    of_draft = token[:, :n, None]
    log_q = s.log_q[:, :n]
    p, q = (jnp.take_along_axis(a, of_draft, axis=2)[..., 0] for a in (log_p[:, :n], log_q))
    passed = is_draft & (log_u[:, :n] <= p - q)
    accepted = jnp.cumprod(passed.astype(jnp.int32), axis=1).sum(axis=1)
    log_p = log_p[batch, accepted]
    rejected = accepted < s.drafted
    q_there = jnp.exp(log_q[batch, jnp.minimum(accepted, n - 1)])
    rest = jnp.exp(log_p) - q_there
    # Rounding may leave nothing, where p = q.
    rest = jnp.where((rest > 0).any(axis=1, keepdims=True), rest, jnp.exp(log_p))
    log_rest = jnp.where(rest > 0, jnp.log(jnp.maximum(rest, 1e-37)), -jnp.inf)
    return accepted, jnp.where(rejected[:, None], log_rest, log_p), rejected


def draw(sampler: TokenSampler, log_p, slot, noise: Noise, rejected):
    """int32 [B, P]; with other noise for the first where a draft was rejected."""
    if sampler.temperature == 0:
        return argmax(log_p, sampler.mask_id)
    usual, first_slot = noise.of_token(slot), slot[:, :1]
    first = usual[:, :1]
    again = where_needed(rejected.any(), lambda: noise.of_residual(first_slot), lambda: first)
    first = jnp.where(rejected[:, None, None], again, first)
    return argmax(log_p + jnp.concatenate([first, usual[:, 1:]], axis=1), sampler.mask_id)


def test_drafts(settings: Settings, s: Speculation, logits, noise: Noise, k: int):
    """(accepted [B], rejected [B], log p [B, V] of the token after the accepted ones, log q
    [B, n, V] of the new drafts)."""
    tables, n, sampler = settings.tables, k - 1, settings.sampler
    slot = s.num_final[:, None] + jnp.arange(k)[None]
    token = _read(tables, s.state.known, slot)
    if settings.style == CHAIN:  # all at once, which is faster
        log_p = sampler.log_probs(logits)
        log_p, log_q = log_p[:, :k], log_p[:, k:]
        # The first mask is the query behind the drafts.
        here = jnp.arange(k)[None] == s.drafted[:, None]
        log_p = jnp.where(here[..., None], log_p[:, n:], log_p)
    else:
        log_p = sampler.log_probs(logits[:, :k])
    accepted, log_p, rejected = _verify(s, log_p, token, _read(tables, noise.log_u_BS, slot))
    if settings.style == STAIRCASE:
        groups = logits[:, k:].reshape(len(logits), k, n, -1)
        log_q = sampler.log_probs(groups[jnp.arange(len(logits)), accepted])
    return accepted, rejected, log_p, log_q
