"""From logits to tokens: temperature, top-k, top-p, and draws that are exact in the tails."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.model.lm_head import exclude_mask_token

# Purposes of a draw at a position: each has its own noise.
TOKEN, ACCEPT, RESIDUAL = range(3)
BOUNDS, SMALL = (1e-30, 1e30), 1e-2  # of temperatures: see at_temperature
MAX_PRECOMPUTED_BYTES = 2**26  # of noise that is drawn before the loop
AT_ONCE = 2**15  # draws at a time


def top_p_filter(logits_BPV, top_p: float):
    """Keeps the smallest set of tokens whose probability reaches `top_p` (and ties of the last);
    −∞ elsewhere. The likeliest token is always kept. Returns float32 of the same shape.
    """
    probs = jax.nn.softmax(logits_BPV, axis=-1)
    falling = -jnp.sort(-probs, axis=-1)
    before = jnp.cumsum(falling, axis=-1) - falling
    last = jnp.maximum(1, jnp.sum(before < top_p, axis=-1, keepdims=True)) - 1
    least = jnp.take_along_axis(falling, last, axis=-1)
    return jnp.where(probs >= least, logits_BPV, -jnp.inf)


def keep_top_k(logits_BPV, top_k: int):
    """Keeps the `top_k` likeliest tokens (and ties of the last); −∞ elsewhere."""
    top_k = min(top_k, logits_BPV.shape[-1])
    kth = jax.lax.top_k(logits_BPV, top_k)[0][..., -1:]
    return jnp.where(logits_BPV >= kth, logits_BPV, -jnp.inf)


def top_k_then_top_p(logits_BPV, top_k: int, top_p: float):
    """Both filters; top_k = 0 and top_p = 1 are off."""
    logits_BPV = keep_top_k(logits_BPV, top_k) if top_k else logits_BPV
    return top_p_filter(logits_BPV, top_p) if top_p < 1 else logits_BPV


def keys_of(row_keys_B, position_BP, purpose: int = TOKEN):
    """[B, P]: one key for each row, text position and purpose, so that a token's draw depends
    neither on its neighbours in the batch nor on the schedule."""

    def one(row_key, position):
        key = jax.random.fold_in(row_key, position)
        return jax.random.fold_in(key, purpose) if purpose else key

    return jax.vmap(jax.vmap(one, (None, 0)))(row_keys_B, position_BP)


def gumbel(keys_BP, vocab_size: int):
    """Standard Gumbel noise float32 [B, P, V], a function of the keys only.

    `mode='high'`: plain float32 noise truncates the tails, which lowers the temperature.
    """

    def one(key):
        return jax.random.gumbel(key, (vocab_size,), jnp.float32, mode="high")

    return jax.vmap(jax.vmap(one))(keys_BP)


def where_needed(is_needed, make: Callable, otherwise: Callable):
    """make() where it is needed, else otherwise(); accelerators always run make(), because their
    host would wait for the decision."""
    return jax.lax.platform_dependent(
        cpu=lambda: jax.lax.cond(is_needed, make, otherwise), default=make
    )


def lazy_gumbel(row_keys_B, position_BS, vocab_size: int, purpose: int = TOKEN):
    """A function from slots [B, P] (integers below S) to their noise, float32 [B, P, V]."""

    def of_slots(slot_BP):
        position_BP = jnp.take_along_axis(position_BS, slot_BP, axis=1)
        return gumbel(keys_of(row_keys_B, position_BP, purpose), vocab_size)

    return of_slots


def precomputed_gumbel(row_keys_B, position_BS, is_wanted_S, vocab_size: int):
    """As lazy_gumbel for tokens, but noise of up to MAX_PRECOMPUTED_BYTES is drawn before the loop:
    on a CPU, the noise of one token costs three to six times as much alone as in a large draw
    (at f499010). Only slots with
    `is_wanted_S` are sure to have noise.
    """
    batch, slots = position_BS.shape
    if 4 * batch * slots * vocab_size > MAX_PRECOMPUTED_BYTES:
        return lazy_gumbel(row_keys_B, position_BS, vocab_size)
    few = min(slots, max(1, AT_ONCE // (batch * vocab_size)))
    rest = -slots % few  # few at a time: intermediate arrays stay in a CPU's cache

    def next_slots(args):
        position_PB, is_wanted_P = args
        return where_needed(
            is_wanted_P.any(),
            lambda: gumbel(keys_of(row_keys_B, position_PB.T), vocab_size),
            lambda: jnp.zeros((batch, few, vocab_size), jnp.float32),
        )

    position_SB = jnp.pad(position_BS.T, ((0, rest), (0, 0))).reshape(-1, few, batch)
    is_wanted = jnp.pad(is_wanted_S, (0, rest)).reshape(-1, few)
    noise = jax.lax.map(next_slots, (position_SB, is_wanted))

    @functools.partial(jax.vmap, in_axes=(1, 0))  # of each row, so that a mesh splits it by rows
    def of_row(noise, slot):
        return noise[slot // few, slot % few]

    return functools.partial(of_row, noise)


def log_uniform(keys_BP):
    """Logarithms of uniform draws, float32 [B, P]: minus an exponential, exact in both tails."""

    def one(key):
        return -jnp.exp(-jax.random.gumbel(key, (), jnp.float32, mode="high"))

    return jax.vmap(jax.vmap(one))(keys_BP)


def argmax(x_BPV, mask_id: int):
    """int32 [B, P]: the first index of the maximum, excluding the mask also among non-finite
    numbers."""
    in_turn, at_once = (functools.partial(f, mask_id=mask_id) for f in (_argmax, _argmax_at_once))
    return jax.lax.platform_dependent(x_BPV, cuda=at_once, default=in_turn)


def _argmax(x_BPV, mask_id: int):
    """Two reductions; one of pairs is slow on CPUs."""
    top, last = x_BPV.max(axis=-1, keepdims=True), x_BPV.shape[-1] - 1
    place = jax.lax.broadcasted_iota(jnp.int32, x_BPV.shape, x_BPV.ndim - 1)
    is_top = (x_BPV == top) & (place != mask_id)
    return jnp.where(is_top, place, last - (mask_id == last)).min(axis=-1)


def _argmax_at_once(x_BPV, mask_id: int):
    """One reduction of pairs: on a GPU half the kernels."""
    last = x_BPV.shape[-1] - 1
    last = np.int32(last - (mask_id == last))
    place = jax.lax.broadcasted_iota(jnp.int32, x_BPV.shape, x_BPV.ndim - 1)
    is_mask = place == mask_id
    pairs = jnp.where(is_mask, -jnp.inf, x_BPV), jnp.where(is_mask, last, place)

    def larger(a, b):
        is_second = (b[0] > a[0]) | ((b[0] == a[0]) & (b[1] < a[1]))
        return tuple(jnp.where(is_second, y, x) for x, y in zip(a, b, strict=True))

    return jax.lax.reduce(pairs, (np.float32(-np.inf), last), larger, (x_BPV.ndim - 1,))[1]


def at_temperature(logits_BPV, temperature):
    """logits / temperature, for any temperature above 0. Temperatures are clipped to BOUNDS; below
    SMALL the differences from the largest logit are divided, because the logits would overflow.
    −∞ stays −∞."""
    low, high = BOUNDS
    if isinstance(temperature, int | float):
        temperature = min(max(temperature, low), high)
        if temperature >= SMALL:
            return logits_BPV / temperature
        is_small = True
    else:  # a traced temperature
        temperature = jnp.clip(temperature, low, high)
        is_small = temperature < SMALL
    top = logits_BPV.max(axis=-1, keepdims=True)
    distance = jnp.where(logits_BPV == top, 0.0, logits_BPV - top)
    distance = jnp.where(logits_BPV == -jnp.inf, -jnp.inf, distance)
    return jnp.where(is_small, distance, logits_BPV) / temperature


@dataclasses.dataclass(frozen=True)
class TokenSampler:
    """Draws tokens from logits. Hashable: it is a static argument of the jitted loop.

    Attributes:
      mask_id: never chosen.
      temperature: 0 = greedy.
      top_p: nucleus, in (0, 1]; 1 = off.
      top_k: 0 = off. Applied before the nucleus.
    """

    mask_id: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __call__(self, logits_BPV, position_BP, noise_BPV):
        """int32 [B, P]: argmax(nucleus(logits / temperature) + Gumbel noise), for any position."""
        del position_BP
        filtered = self._filtered(logits_BPV)
        return argmax(filtered + noise_BPV if self.temperature > 0 else filtered, self.mask_id)

    def log_probs(self, logits_BPV):
        """float32 [B, P, V]: of the distribution that tokens are drawn from."""
        filtered = self._filtered(logits_BPV)
        if self.temperature == 0:
            best = argmax(filtered, self.mask_id)[..., None]
            token = jax.lax.broadcasted_iota(jnp.int32, filtered.shape, filtered.ndim - 1)
            return jnp.where(token == best, 0.0, -jnp.inf)
        return jax.nn.log_softmax(filtered, axis=-1)

    def _filtered(self, logits_BPV):
        logits_BPV = exclude_mask_token(logits_BPV, self.mask_id)
        if self.temperature == 0:
            return logits_BPV
        logits_BPV = at_temperature(logits_BPV, self.temperature)
        return top_k_then_top_p(logits_BPV, self.top_k, self.top_p)
