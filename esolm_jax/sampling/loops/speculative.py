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

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.config import DRAFT_STYLES
from esolm_jax.errors import UserError
from esolm_jax.sampling.engine.choose import (
    ACCEPT,
    RESIDUAL,
    keys_of,
    lazy_gumbel,
    log_uniform,
    precomputed_gumbel,
)
from esolm_jax.sampling.engine.network import Network
from esolm_jax.sampling.loops.drafts import (
    CHAIN,
    Noise,
    Settings,
    Speculation,
    draw,
    predict,
    test_drafts,
)
from esolm_jax.sampling.loops.loop import (
    Decoded,
    Jitted,
    Loop,
    Program,
    Task,
    first_eos,
    over_rows,
    pad_columns,
    scatter_columns,
)
from esolm_jax.sampling.loops.plain import Places, in_text_order
from esolm_jax.sampling.loops.run_passes import State, prefill
from esolm_jax.sampling.plan.passes import leftmost


@dataclasses.dataclass(frozen=True)
class Speculative(Loop):
    """Generates the texts of a plan of eso_b with one token per pass, in fewer passes.

    Attributes:
      task: see Task; its sampler is a TokenSampler.
      draft_tokens: k, tokens that a pass may yield, at least 2.
      adaptive: k is an upper bound, and each row adapts its own.
      style: one of DRAFT_STYLES.
    """

    task: Task
    draft_tokens: int
    adaptive: bool = False
    style: str = CHAIN

    def __post_init__(self):
        if self.draft_tokens < 2 or self.style not in DRAFT_STYLES:
            raise UserError(
                f"draft_tokens={self.draft_tokens}, style={self.style!r}: must be at least 2, and "
                f"one of {', '.join(DRAFT_STYLES)}"
            )

    def start(self, network: Network) -> tuple[State, list[Program]]:
        plan, k = self.task.plan, self.draft_tokens
        state, tables, programs = prefill(network, self.task, margin=k)
        smaller = {2**i for i in range(1, 10) if 2**i < k} if self.adaptive else set()
        settings = Settings(
            tables=tables,
            row_keys=over_rows(self.task.mesh, self.task.row_keys),
            length=plan.length.astype(np.int32),
            leftmost_unknown=leftmost(plan.order, plan.length),
            sampler=self.task.sampler,
            style=self.style,
            sizes=tuple(sorted({*smaller, k})),
            eos_id=self.task.eos_id,
        )
        places = Places(plan.order, plan.shift)
        finish = Program(_finish, places)
        return state, [*programs, Program(_run, settings), finish]


def _one_pass(network, settings: Settings, s: Speculation, noise: Noise, k: int):
    """One pass that yields at most k tokens: (what it leaves, accepted [B], rejected [B])."""
    tables, length, n, most = settings.tables, settings.length, k - 1, settings.sizes[-1] - 1
    logits, entries = predict(network, settings, s, k)
    accepted, rejected, log_p, log_q = test_drafts(settings, s, logits, noise, k)
    num_final = s.num_final + accepted + 1
    # The token after the accepted ones, and new drafts.
    to = num_final[:, None] - 1 + jnp.arange(k)[None]
    log_p = jnp.concatenate([log_p[:, None], log_q], axis=1)
    last_slot = tables.order.shape[1] - 1
    tokens = draw(settings.sampler, log_p, jnp.minimum(to, last_slot), noise, rejected)
    more = jnp.minimum(s.draft_budget - 1, n)
    if settings.style == CHAIN:
        more = jnp.where(rejected, 0, more)
    state = s.state.replace(
        known=scatter_columns(s.state.known, tokens, to, to < length[:, None]),
        cache=s.state.cache.write(entries, s.filled),
    )
    num_final = jnp.minimum(num_final, length)
    column = jnp.arange(n)[None]
    proposed = (column <= accepted[:, None]) & (column < s.drafted[:, None])
    passed = column < accepted[:, None]
    s = s.replace(
        state=state,
        num_final=num_final,
        filled=jnp.maximum(num_final - 1, s.filled),
        drafted=jnp.clip(length - num_final, 0, more),
        log_q=pad_columns(log_q, most),
        proposed=s.proposed + pad_columns(proposed, most).astype(jnp.int32),
        accepted=s.accepted + pad_columns(passed, most).astype(jnp.int32),
    )
    return s, accepted, rejected


@Jitted
def _run(network: Network, state: State, settings: Settings) -> Speculation:
    tables, sizes, vocab_size = settings.tables, settings.sizes, network.config.vocab_size
    s = _start(state, tables.num_known, sizes, vocab_size)
    slot = jnp.arange(tables.order.shape[1])
    is_wanted = (slot >= tables.num_known.min()) & (slot < settings.length.max())
    row_keys, order = settings.row_keys, tables.order
    noise = Noise(
        of_token=precomputed_gumbel(row_keys, order, is_wanted, vocab_size),
        of_residual=lazy_gumbel(row_keys, order, vocab_size, RESIDUAL),  # few are drawn
        log_u_BS=log_uniform(keys_of(row_keys, order, ACCEPT)),
    )

    def body_fn(s: Speculation) -> Speculation:
        before = s.num_final
        branches = [lambda s, k=k: _one_pass(network, settings, s, noise, k) for k in sizes]
        if len(sizes) > 1:
            need = jnp.maximum(s.draft_budget, s.drafted + 1).max()
            drafted = s.drafted
            s, accepted, rejected = jax.lax.switch(
                jnp.searchsorted(jnp.array(sizes), need), branches, s
            )
            grown = jnp.where(
                drafted > 0, jnp.minimum(2 * s.draft_budget, sizes[-1]), s.draft_budget
            )
            s = s.replace(draft_budget=jnp.where(rejected, jnp.maximum(accepted + 1, 2), grown))
        else:
            s, _, _ = branches[0](s)
        return s.replace(state=_reveal(s.state, settings, before, s.num_final))

    def cond_fn(s: Speculation):
        at = s.num_final[:, None]
        left = jnp.take_along_axis(settings.leftmost_unknown, at, axis=1)[:, 0]
        return ~((s.num_final >= settings.length) | (s.state.eos_position < left)).all()

    return jax.lax.while_loop(cond_fn, body_fn, s)


def _reveal(state: State, settings: Settings, before, num_final) -> State:
    """Marks the tokens from `before` on as generated by this pass."""
    tables, slot = settings.tables, jnp.arange(state.revealed_at.shape[1])[None]
    new = (slot >= before[:, None]) & (slot < num_final[:, None])
    eos_position = state.eos_position
    if settings.eos_id is not None:
        is_eos = new & (state.known[:, : slot.shape[1]] == settings.eos_id)
        eos_position = jnp.minimum(eos_position, first_eos(tables, is_eos, tables.order))
    revealed_at = jnp.where(new, state.pass_index, state.revealed_at)
    return state.replace(
        revealed_at=revealed_at, eos_position=eos_position, pass_index=state.pass_index + 1
    )


def _start(state: State, num_known, sizes, vocab_size: int) -> Speculation:
    """Before the first pass: known tokens are final, and nothing is drafted."""
    batch, most = len(num_known), sizes[-1] - 1
    return Speculation(
        state=state,
        num_final=num_known,
        filled=num_known,
        drafted=jnp.zeros(batch, jnp.int32),
        log_q=jnp.zeros((batch, most, vocab_size)),
        draft_budget=jnp.full(batch, sizes[0], jnp.int32),
        proposed=jnp.zeros((batch, most), jnp.int32),
        accepted=jnp.zeros((batch, most), jnp.int32),
    )


@jax.jit
def _finish(network: Network, s: Speculation, places: Places) -> Decoded:
    decoded = in_text_order(network, s.state, places)
    return decoded.replace(drafts={"proposed": s.proposed, "accepted": s.accepted})
