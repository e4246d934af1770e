"""Lossless speculation: several tokens a pass, from exactly the distribution of one token a pass.

For Eso-LM (B), in both phases. A pass takes the n = k − 1 tokens that were drafted before. They
enter the cache as context, and query copies at their ranks give their exact conditionals
p(x_σ(i) | x_σ(<i)), because a query copy reads only the context below its rank. Each draft, drawn
from q, is accepted with probability min(1, p / q). At the first rejection the token is drawn from
(p − q)₊ instead, and later drafts are dropped: their slots of the cache count as unfilled. If
none is rejected, the query after the last draft gives one more token. So a pass yields 1 to k
tokens.

The same pass drafts the next n, in one of two ways:

    chain      masks behind all drafts, each reading those before it, as masks do in training.
               3k − 1 tokens a pass; after a rejection there is nothing to verify in the next.
    staircase  for every number of drafts that may be accepted, n query copies that read the
               context up to there and themselves. k² + k tokens per pass; every pass verifies.

How many tokens a pass may yield is fixed, or adapts in each row: doubled when all drafts were
accepted, cut back to what was. AR has no masks to draft with.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.sampling.engine import cache as cache_lib
from esolm_jax.sampling.engine import network as network_lib
from esolm_jax.sampling.engine.choose import (
    ACCEPT,
    RESIDUAL,
    TokenSampler,
    argmax,
    keys_of,
    lazy_gumbel,
    log_uniform,
    precomputed_gumbel,
)
from esolm_jax.sampling.engine.network import Network, Window
from esolm_jax.sampling.loops import decode as decode_lib
from esolm_jax.sampling.loops.decode import NEVER, Decoded, State
from esolm_jax.sampling.plan.passes import DecodePlan, leftmost

STYLES = ("chain", "staircase")


@flax.struct.dataclass
class Speculation:
    """What a pass hands to the next.

    Attributes:
      state: of the plain loop; its tokens behind `count` are drafts.
      count: int32 [B], tokens that stand; all but the last of them are in the cache.
      filled: int32 [B], slots of the cache that are.
      drafted: int32 [B], drafts behind them, and log_q: float32 [B, n, V], what they were drawn
        from.
      draft_budget: int32 [B], how many tokens a pass may yield.
      tested, accepted: int32 [B, n], how many drafts were put to the test at each place behind the
        last token that stood, and passed. (A draft behind a rejected one is not tested.)
    """

    state: State
    count: jax.Array
    filled: jax.Array
    drafted: jax.Array
    log_q: jax.Array
    draft_budget: jax.Array
    tested: jax.Array
    accepted: jax.Array


def _labels(style: str, k: int, s: Speculation):
    """(slot, rank, in_context) [B, W] of a pass: k contexts, then the tokens that predict."""
    n = k - 1
    step = jnp.arange(k)[None]
    count, drafted = s.count[:, None], s.drafted[:, None]
    context = s.filled[:, None] + step
    is_real = context < count + drafted
    if style == "chain":
        query, mask = count + step[:, :n], count + drafted + step
        slot = jnp.concatenate([context, query, mask], axis=1)
        rank = jnp.concatenate([jnp.where(is_real, context, NEVER), query, mask], axis=1)
        in_context = [np.ones(k, bool), np.zeros(n, bool), np.ones(k, bool)]
    else:
        query = count + step
        # Of group a: behind `a` accepted drafts and the token after them.
        behind = query[:, :, None] + 1 + jnp.arange(n)[None, None]
        # Ranks k apart leave room for query copies that read alike, but not each other.
        apart = k * query[:, :, None] - 1 - jnp.arange(n)[None, None]
        batch = len(query)
        slot = jnp.concatenate([context, query, behind.reshape(batch, k * n)], axis=1)
        context = jnp.where(is_real, k * context, NEVER)
        rank = jnp.concatenate([context, k * query, apart.reshape(batch, k * n)], axis=1)
        in_context = [np.ones(k, bool), np.zeros(k + k * n, bool)]
    return slot, rank, jnp.asarray(np.concatenate(in_context))[None]


def _read(passes: DecodePlan, array, slot):
    """[B, W]: positions or tokens of these slots; behind the last slot, of the last."""
    return jnp.take_along_axis(array, jnp.minimum(slot, passes.order.shape[1] - 1), axis=1)


def _predict(network, passes: DecodePlan, s: Speculation, style: str, k: int):
    """Runs a pass: logits [B, P, V] of the k that stand or fall and, behind them, of drafts in
    groups of n (one group in a chain); and what enters the cache."""
    slot, rank, in_context = _labels(style, k, s)
    position, token = (_read(passes, a, slot) for a in (passes.order, s.state.known))
    is_context = jnp.arange(slot.shape[1])[None] < k
    width = slot.shape[1]
    window = Window(
        token=jnp.where(is_context, token, passes.unknown),
        position=position,
        rank=rank,
        in_context=in_context,
        filled=s.filled,
        pick=jnp.broadcast_to(jnp.arange(k, width)[None], (len(slot), width - k)),
    )
    logits, keys, values = network_lib.forward(network, window, s.state.cache)
    return logits, *jax.tree.map(lambda a: a[:, :, :k], (keys, values))


def _verify(s: Speculation, log_p, token, log_u):
    """(accepted [B], log p of the token after them [B, V], whether a draft was rejected, so that it
    is to be drawn with residual noise). `log_p` [B, k, V], `token` and the logarithms of uniform
    draws `log_u` [B, k]: from `count` on."""
    n, batch = token.shape[1] - 1, jnp.arange(len(token))
    place = jnp.arange(n)[None]
    is_draft = place < s.drafted[:, None]
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


def _draw(choice: TokenSampler, log_p, slot, noise, rejected):
    """int32 [B, P]; with other noise for the first where a draft was rejected."""
    if choice.temperature == 0:
        return argmax(log_p, choice.mask_id)
    of_token, of_residual = noise
    usual, first_slot = of_token(slot), slot[:, :1]
    first = usual[:, :1]
    again = jax.lax.cond(rejected.any(), lambda: of_residual(first_slot), lambda: first)
    first = jnp.where(rejected[:, None, None], again, first)
    return argmax(log_p + jnp.concatenate([first, usual[:, 1:]], axis=1), choice.mask_id)


def _one_pass(network, passes, s: Speculation, log_u, *, noise, choice, style, k, most, length):
    """One pass that yields at most k tokens; `most` is the largest k of all passes. Of slots:
    `noise`, two functions for draws of tokens and for those behind a rejected draft, and `log_u`
    for the test of drafts."""
    n, batch = k - 1, jnp.arange(len(s.count))
    logits, new_keys, new_values = _predict(network, passes, s, style, k)
    slot = s.count[:, None] + jnp.arange(k)[None]
    token = _read(passes, s.state.known, slot)
    if style == "chain":  # all at once, which is faster
        log_p = choice.log_probs(logits)
        log_p, log_q = log_p[:, :k], log_p[:, k:]
        # The first mask is the query behind the drafts.
        here = jnp.arange(k)[None] == s.drafted[:, None]
        log_p = jnp.where(here[..., None], log_p[:, n:], log_p)
    else:
        log_p = choice.log_probs(logits[:, :k])
    accepted, log_p, rejected = _verify(s, log_p, token, _read(passes, log_u, slot))
    if style == "staircase":
        groups = logits[:, k:].reshape(len(logits), k, n, -1)
        log_q = choice.log_probs(groups[batch, accepted])
    count = s.count + accepted + 1
    # The token after those that stand, and new drafts.
    to = count[:, None] - 1 + jnp.arange(k)[None]
    log_p = jnp.concatenate([log_p[:, None], log_q], axis=1)
    tokens = _draw(choice, log_p, jnp.minimum(to, passes.order.shape[1] - 1), noise, rejected)
    more = jnp.minimum(s.draft_budget - 1, n)
    if style == "chain":
        more = jnp.where(rejected, 0, more)
    state = s.state.replace(
        known=decode_lib.put(s.state.known, tokens, to, to < length[:, None]),
        cache=cache_lib.write(
            s.state.cache, new_keys, new_values, s.filled, tokens, aligned=len(count) == 1
        ),
    )
    count = jnp.minimum(count, length)
    tested = (jnp.arange(n)[None] <= accepted[:, None]) & (jnp.arange(n)[None] < s.drafted[:, None])
    s = s.replace(
        state=state,
        count=count,
        filled=jnp.maximum(count - 1, s.filled),
        drafted=jnp.clip(length - count, 0, more),
        log_q=_filled_up(log_q, most - 1),
        tested=s.tested + _filled_up(tested, most - 1).astype(jnp.int32),
        accepted=s.accepted
        + _filled_up(jnp.arange(n)[None] < accepted[:, None], most - 1).astype(jnp.int32),
    )
    return s, accepted, rejected


def _filled_up(array, size: int):
    """With zeros behind, [B, size, …]."""
    return jnp.pad(array, ((0, 0), (0, size - array.shape[1]), *[(0, 0)] * (array.ndim - 2)))


@functools.partial(
    jax.jit,
    static_argnames=("choice", "style", "sizes", "eos_id"),
    donate_argnames="state",
)
def _run(
    network, passes, state, row_keys, length, leftmost_unknown, *, choice, style, sizes, eos_id
):
    s = _start(state, passes.given, sizes, network.config.vocab_size)
    slot, vocab_size = jnp.arange(passes.order.shape[1]), network.config.vocab_size
    is_wanted = (slot >= passes.given.min()) & (slot < length.max())
    noise = (
        precomputed_gumbel(row_keys, passes.order, is_wanted, vocab_size),
        lazy_gumbel(row_keys, passes.order, vocab_size, RESIDUAL),  # rarely used
    )
    log_u = log_uniform(keys_of(row_keys, passes.order, ACCEPT))

    def body_fn(s: Speculation):
        before = s.count
        common = dict(noise=noise, choice=choice, style=style, most=sizes[-1], length=length)
        branches = [functools.partial(_one_pass, k=k, **common) for k in sizes]
        args = network, passes, s, log_u
        if len(sizes) > 1:
            need = jnp.maximum(s.draft_budget, s.drafted + 1).max()
            which = jnp.searchsorted(jnp.array(sizes), need)
            drafted = s.drafted
            s, accepted, rejected = jax.lax.switch(which, branches, *args)
            grown = jnp.where(
                drafted > 0, jnp.minimum(2 * s.draft_budget, sizes[-1]), s.draft_budget
            )
            s = s.replace(draft_budget=jnp.where(rejected, jnp.maximum(accepted + 1, 2), grown))
        else:
            s, _, _ = branches[0](*args)
        return s.replace(state=_reveal(s.state, passes, before, s.count, eos_id))

    def cond_fn(s: Speculation):
        left = jnp.take_along_axis(leftmost_unknown, s.count[:, None], axis=1)[:, 0]
        return ~((s.count >= length) | (s.state.eos_position < left)).all()

    return jax.lax.while_loop(cond_fn, body_fn, s)


def _reveal(state: State, passes, before, count, eos_id) -> State:
    """Marks the tokens from `before` on as generated by this pass."""
    slot = jnp.arange(state.revealed.shape[1])[None]
    new = (slot >= before[:, None]) & (slot < count[:, None])
    eos_position = state.eos_position
    if eos_id is not None:
        is_end = new & (state.known[:, : slot.shape[1]] == eos_id)
        is_end &= passes.order > decode_lib.last_given(passes)
        eos_position = jnp.minimum(eos_position, jnp.where(is_end, passes.order, NEVER).min(axis=1))
    revealed = jnp.where(new, state.next, state.revealed)
    return state.replace(revealed=revealed, eos_position=eos_position, next=state.next + 1)


def _start(state: State, given, sizes, vocab_size: int) -> Speculation:
    """Before the first pass: what is given stands, and nothing is drafted."""
    batch, most = len(given), sizes[-1] - 1
    return Speculation(
        state=state,
        count=given,
        filled=given,
        drafted=jnp.zeros(batch, jnp.int32),
        log_q=jnp.zeros((batch, most, vocab_size)),
        draft_budget=jnp.full(batch, sizes[0], jnp.int32),
        tested=jnp.zeros((batch, most), jnp.int32),
        accepted=jnp.zeros((batch, most), jnp.int32),
    )


def speculate(
    network: Network,
    passes: DecodePlan,
    choice: TokenSampler,
    keys,
    *,
    k: int,
    adaptive: bool = False,
    style: str = "chain",
    mesh=None,
    eos_id: int | None = None,
    dry_run: bool = False,
) -> tuple[Decoded, dict]:
    """Generates what `passes` (of passes.eso_b) would one token a pass, in fewer passes.

    Args:
      k: tokens a pass may yield, at least 2; `adaptive`: at most, see above.
      style: one of STYLES.
      others: as of decode.decode.

    Returns:
      What was generated, and {"tested", "accepted"}: int32 [B, k − 1], drafts by how far they were
      behind the last token that stood.
    """
    keys = decode_lib.over_rows(mesh, keys)
    tables, state = decode_lib.prefill(network, passes, keys, margin=k, mesh=mesh, dry_run=dry_run)
    sizes = tuple(sorted({*(2**i for i in range(1, 10) if 2**i < k), k})) if adaptive else (k,)
    s = _run(
        network, tables, state, keys, (passes.given if dry_run else passes.length).astype(np.int32),
        leftmost(passes.order, passes.length), choice=choice, style=style, sizes=sizes,
        eos_id=eos_id,
    )  # fmt: skip
    return decode_lib.in_text_order(s.state, passes), {"tested": s.tested, "accepted": s.accepted}
