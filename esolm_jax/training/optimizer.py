"""AdamW behind a global-norm clip, warm-up, and an exponential moving average of the weights."""

import math

import jax
import jax.numpy as jnp
import optax


def learning_rate(config) -> optax.Schedule:
    """Linear warm-up from 0, then constant, or a half cosine down to 0 at train.steps."""
    o = config.optimizer
    warmup = optax.linear_schedule(0.0, o.learning_rate, o.warmup_steps)
    if o.schedule == "cosine":
        after = optax.cosine_decay_schedule(
            o.learning_rate, max(1, config.train.steps - o.warmup_steps)
        )
    else:
        after = optax.constant_schedule(o.learning_rate)
    return optax.join_schedules([warmup, after], [o.warmup_steps]) if o.warmup_steps else after


def make(config) -> optax.GradientTransformationExtraArgs:
    """AdamW behind a global-norm clip: update(grads, state, params, *, counts).

    If `counts` (bool scalar) is False, updates are zero and the state does not change, even if
    gradients are NaN. Scalars and zeros in place of gradients do that: to choose between new and
    old moments, a CPU's program keeps another copy of each.
    """
    o = config.optimizer
    clip = optax.clip_by_global_norm(o.clip_norm)

    def adamw(counts):
        b1, b2 = jnp.where(counts, o.b1, 1.0), jnp.where(counts, o.b2, 1.0)
        rate = learning_rate(config)
        return optax.adamw(rate, b1=b1, b2=b2, eps=o.eps, weight_decay=o.weight_decay)

    def update(grads, state, params, *, counts):
        clipped, clip_state = clip.update(grads, state[0])
        counted = _or_zero(counts, clipped)
        updates, new = adamw(counts).update(counted, state[1], params)
        new = jax.tree.map(lambda a, b: a if a.ndim else jnp.where(counts, a, b), new, state[1])
        return _or_zero(counts, updates), (clip_state, new)

    init = optax.chain(clip, adamw(True)).init
    return optax.GradientTransformationExtraArgs(init, update)


def _or_zero(counts, tree):
    return jax.tree.map(lambda a: jnp.where(counts, a, jnp.zeros_like(a)), tree)


def largest_growth(config) -> float:
    """The most that a weight can grow in all steps: lr · steps · max |m̂| / (√v̂ + ε), or infinity.

    By Cauchy–Schwarz |m̂| <= √v̂ / √((1 − b1² / b2) (1 − b2)); where the squares of gradients are
    too small for a float, |m̂| < 2⁻⁶³. Weight decay with lr · wd <= 1 only shrinks weights.
    """
    o = config.optimizer
    if o.b1**2 >= o.b2 or o.learning_rate * o.weight_decay > 1:
        return math.inf
    ratio = ((1 - o.b1**2 / o.b2) * (1 - o.b2)) ** -0.5 + 2.0**-63 / o.eps
    return o.learning_rate * config.train.steps * ratio


def last_learning_rate(config, opt_state):
    """The learning rate of the last update: float32. The optimizer counts its own updates; a model
    that continues from converted weights has more steps than updates."""
    _, count = optax.tree.get_all_with_path(opt_state, "count")[-1]
    return jnp.asarray(learning_rate(config)(count - 1), jnp.float32)


def update_ema(ema, params, decay: float, num_updates, counts=True):
    """ema ← d·ema + (1−d)·params with d = min(decay, (1+n)/(10+n)) at the n-th update, n >= 1; d is
    1 where `counts` is False."""
    n = num_updates.astype(jnp.float32)
    d = jnp.minimum(decay, (1.0 + n) / (10.0 + n))
    share = jnp.where(counts, 1.0 - d, 0.0)
    return jax.tree.map(lambda e, p: e - share * (e - p), ema, params)
