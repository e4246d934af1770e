"""Which masks of a pass become known: scores of positions, and the best k of them."""

import jax
import jax.numpy as jnp


def draw(logits_BWV, gumbel_BWV):
    """(token int32 [B, W], its probability float32 [B, W], all probabilities [B, W, V]). Without
    noise (None), the likeliest token. The mask token may be drawn: the position then stays
    masked."""
    perturbed = logits_BWV if gumbel_BWV is None else logits_BWV + gumbel_BWV
    token = jnp.argmax(perturbed, axis=-1).astype(jnp.int32)
    probs = probabilities(logits_BWV)
    return token, probability(probs, token), probs


def probabilities(logits_BWV):
    """Softmax in float32."""
    return jax.nn.softmax(logits_BWV.astype(jnp.float32), axis=-1)


def probability(probs_BWV, token_BW):
    """The probability of each token, [B, W]."""
    return jnp.take_along_axis(probs_BWV, token_BW[..., None], axis=-1)[..., 0]


def margin(probs_BWV):
    """The largest probability minus the second one, [B, W]."""
    best, second = jnp.moveaxis(jax.lax.top_k(probs_BWV, 2)[0], -1, 0)
    return best - second


def negative_entropy(probs_BWV):
    """Σ p log(p + 1e-10), as published, [B, W]."""
    return jnp.sum(probs_BWV * jnp.log(probs_BWV + 1e-10), axis=-1)


def without(logits_BWV, ids: tuple[int, ...]):
    """The logits with −∞ for these ids."""
    return logits_BWV if not ids else logits_BWV.at[..., jnp.array(ids)].set(-jnp.inf)


def best(score_BW, allowed_BW, count_B):
    """bool [B, W]: the `count` allowed positions of each row with the highest scores, fewer if
    there are not as many; of equal scores the first positions."""
    order = jnp.argsort(jnp.where(allowed_BW, -score_BW, jnp.inf), axis=1, stable=True)
    place = jnp.argsort(order, axis=1)
    return allowed_BW & (place < count_B[:, None])


def first(allowed_BW, count_B):
    """bool [B, W]: the allowed positions among the `count` from the first allowed one on."""
    position = jnp.arange(allowed_BW.shape[1])[None]
    start = jnp.argmax(allowed_BW, axis=1)[:, None]
    return allowed_BW & (position < start + count_B[:, None])
