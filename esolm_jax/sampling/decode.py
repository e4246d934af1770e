"""The decoding loop: one jitted program over an explicit KV cache, for every family.

Known tokens, the cache and the tables of the passes go in; what a pass does is read off the tables
(see passes.py), so the loop knows no family.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from esolm_jax import model as model_lib
from esolm_jax.kv_cache import UNREAD_RANK, KVCache
from esolm_jax.labels import Tokens
from esolm_jax.model import ModelConfig
from esolm_jax.sampling.passes import Passes


@flax.struct.dataclass
class State:
    """What a pass hands to the next.

    Attributes:
      known: int32 [B, L + W + 1], the tokens in generation order (behind the start token if AR).
      cache: KVCache of L + W slots.
      logits: float32 [B, L + W, V] at each rank when it was generated, or None.
    """

    known: jax.Array
    cache: KVCache
    logits: jax.Array | None


def _window(passes: Passes, state: State, i, width: int) -> Tokens:
    """The labelled tokens of pass i, [B, width]; filler gets a rank that nobody reads."""
    start = passes.start[i]
    slot = start + jnp.arange(width)
    batch = passes.order.shape[0]
    position = jax.lax.dynamic_slice_in_dim(passes.order, start, width, axis=1)
    text = jax.lax.dynamic_slice_in_dim(state.known, start, width, axis=1)
    rank = jax.lax.dynamic_slice_in_dim(passes.rank, start, width)
    rank = jnp.where(slot < passes.bidirectional_below[i], 0, rank)
    rank = jnp.where(slot < passes.end[i], rank, UNREAD_RANK)
    is_known = slot < passes.first[i] + passes.shift
    return Tokens(
        token=jnp.where(is_known[None], text, passes.unknown),
        position=position,
        rank=jnp.broadcast_to(rank, (batch, width)),
        in_context=jnp.ones((batch, width), bool),
    )


def _put(array, update, start, keep_P):
    """Writes the kept columns of update [B, P, …] into array at [:, start:start + P]."""
    old = jax.lax.dynamic_slice_in_dim(array, start, update.shape[1], axis=1)
    keep = keep_P.reshape(1, -1, *[1] * (array.ndim - 2))
    return jax.lax.dynamic_update_slice_in_dim(array, jnp.where(keep, update, old), start, axis=1)


@functools.partial(
    jax.jit,
    static_argnames=("config", "mesh", "choice", "width", "generated"),
    donate_argnames="state",
)
def _run(config, mesh, params, passes, state, row_keys_B, low, high, *, choice, width, generated):
    """Passes low … high − 1, all of one window width, generating at most `generated` tokens."""
    apply = model_lib.bind(config, mesh)

    def one_pass(i, state):
        tokens = _window(passes, state, i, width)
        start, first = passes.start[i], passes.first[i]
        logits, cache = apply(
            params, tokens, cache=state.cache, start=start, predict=(first - start, generated)
        )
        position = jax.lax.dynamic_slice_in_dim(passes.order, first, generated, axis=1)
        chosen = choice(logits, position, row_keys_B)
        keep = jnp.arange(generated) < passes.size[i]
        known = _put(state.known, chosen, first + passes.shift, keep)
        if state.logits is not None:
            state = state.replace(logits=_put(state.logits, logits, first, keep))
        return state.replace(known=known, cache=cache)

    return jax.lax.fori_loop(low, high, one_pass, state)


def decode(
    config: ModelConfig,
    params,
    passes: Passes,
    choice,
    key,
    *,
    mesh=None,
    with_logits: bool = False,
    dry_run: bool = False,
):
    """Runs all passes and returns int32 [B, L] tokens in text order.

    Args:
      passes: tables for B rows; see passes.py.
      choice: Choice, or any hashable callable of the same form.
      key: one key; row b draws from fold_in(key, b).
      mesh: where the parameters lie; None = one device. B must divide by its row shards.
      with_logits: also return float32 [B, L, V], by rank, the logits each token was drawn from
        (mask token not excluded).
      dry_run: compile, but run no pass.
    """
    batch, length = passes.order.shape
    segments = passes.segments()
    margin = max(width for _, _, width in segments)
    passes = passes.padded(margin)
    state = State(
        known=jnp.full((batch, length + margin + 1), passes.start_token, jnp.int32),
        cache=KVCache.empty(config, batch, length + margin),
        logits=jnp.zeros((batch, length + margin, config.vocab_size)) if with_logits else None,
    )
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    for low, high, width in segments:
        state = _run(
            config,
            mesh,
            params,
            passes,
            state,
            row_keys,
            low,
            low if dry_run else high,
            choice=choice,
            width=width,
            generated=int(passes.size[low:high].max()),
        )
    by_rank = state.known[:, passes.shift : passes.shift + length]
    text = jnp.zeros_like(by_rank)
    text = jnp.put_along_axis(text, passes.order[:, :length], by_rank, axis=1, inplace=False)
    return (text, state.logits[:, :length]) if with_logits else text
