"""The noise schedule: the fraction of the text that is known at time t (arXiv 2506.01928)."""

import jax
import jax.numpy as jnp

EPS = 1e-3  # both the floor of t and the ε of the schedule, as published


def alpha(t, alpha_0: float):
    """α_t = α₀ (1 − (1−ε) t): the probability that a token is known at time t."""
    return alpha_0 * (1.0 - (1.0 - EPS) * t)


def dalpha(alpha_0: float) -> float:
    """α'_t = −α₀ (1−ε), the same at every t."""
    return -alpha_0 * (1.0 - EPS)


def elbo_weight(t, alpha_0: float):
    """−α'_t / (1 − α_t): the weight of a masked token's cross-entropy in the diffusion loss."""
    return -dalpha(alpha_0) / (1.0 - alpha(t, alpha_0))


def alpha_of_weight(weight, alpha_0: float):
    """α_t of a token with this elbo_weight."""
    return 1.0 + dalpha(alpha_0) / weight


def stratified_times(key, shape: tuple[int, ...], u=None):
    """Times t = (u + i)/n for i < n = prod(shape), one u for all, mapped to [ε, 1]; float32.

    Drawn over the *global* batch, so that every batch covers all noise levels evenly; in random
    order, so that each row's time is uniform, also if rows come in a fixed order.

    Args:
      u: a number in [0, 1); None: drawn uniformly.
    """
    key_u, key_deal = jax.random.split(key)
    n = 1
    for size in shape:
        n *= size
    u = jax.random.uniform(key_u, ()) if u is None else u
    t = (u + jnp.arange(n, dtype=jnp.float32)) / n
    t = jax.random.permutation(key_deal, t)
    return (EPS + (1.0 - EPS) * t).reshape(shape)


def draw_masks(key, probability_known, valid_BL):
    """Bool [B, L]: True where a (real) token is masked, each with probability 1 − α."""
    masked = jax.random.uniform(key, valid_BL.shape) >= probability_known
    return masked & valid_BL
