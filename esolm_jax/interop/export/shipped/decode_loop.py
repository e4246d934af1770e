"""Two-phase generation with any artefact, following `plan`. Needs only numpy.

`plan` is the `sampling` section of config.json. Slot j of a row holds the token of rank j in the
order of generation; with shift = 1 (AR) the start token precedes them.
"""

import numpy as np


def draw_orders(plan, seed, batch):
    """(order int32 [B, L], the position generated at each rank; int32 [B], the number of ranks in
    the diffusion phase). Diffusion positions come in random order, the rest left to right. Same
    draws as `python -m esolm_jax.sample` with this seed."""
    length, block = plan["length"], plan["order_block"]
    if plan["order"] is not None:
        order = np.tile(np.array(plan["order"], np.int32), (batch, 1))
        return order, np.full(batch, plan["num_diffusion"], np.int32)
    orders, num_diffusion = np.zeros((batch, length), np.int32), np.zeros(batch, np.int32)
    for row in range(batch):
        rng = np.random.default_rng([seed, 0, row])
        for start in range(0, length, block):
            positions = np.arange(start, min(start + block, length))
            count = rng.binomial(len(positions), plan["alpha_0"])
            shuffled = rng.permutation(positions)
            in_order = np.concatenate([shuffled[:count], np.sort(shuffled[count:])])
            orders[row, start : start + len(positions)] = in_order
            if count:
                num_diffusion[row] = start + count
    return orders, num_diffusion


def filtered(plan, logits, temperature):
    """float64 [..., V]: logits of the sampling distribution; −∞ at the mask, below the top_k
    most probable tokens, and outside the smallest set that reaches top_p."""
    logits = np.array(logits, np.float64)
    logits[..., plan["mask_id"]] = -np.inf
    logits = logits - logits.max(axis=-1, keepdims=True)  # small temperatures do not overflow
    if temperature == 0:
        return logits
    logits = logits / temperature
    falling = -np.sort(-logits, axis=-1)
    if plan["top_k"]:
        kth = falling[..., min(plan["top_k"], logits.shape[-1]) - 1, None]
        logits = np.where(logits >= kth, logits, -np.inf)
        falling = np.where(falling >= kth, falling, -np.inf)
    if plan["top_p"] < 1:
        probs = np.exp(falling) / np.exp(falling).sum(axis=-1, keepdims=True)
        before = np.cumsum(probs, axis=-1) - probs
        last = np.maximum(1, np.sum(before < plan["top_p"], axis=-1, keepdims=True)) - 1
        logits = np.where(logits >= np.take_along_axis(falling, last, axis=-1), logits, -np.inf)
    return logits


def read_temperature(text):
    """A temperature: 0 (greedy), or clipped to [1e-30, 1e30] as in `sample`. SystemExit: negative
    or not finite."""
    temperature = float(text)
    if not 0 <= temperature < np.inf:
        raise SystemExit(f"error: TEMPERATURE={text}: must be at least 0, and finite")
    return temperature and min(max(temperature, 1e-30), 1e30)


def chooser(plan, temperature=0.0, rng=None):
    """choose(logits [B, P, V]) → int32 [B, P]; temperature 0 = greedy. The mask is never chosen."""

    def choose(logits):
        logits = filtered(plan, logits, temperature)
        if temperature > 0:
            logits = logits + rng.gumbel(size=logits.shape)
        return logits.argmax(axis=-1).astype(np.int32)

    return choose


def passes(plan):
    """(first slot, tokens of the pass before, tokens of the pass) of every pass."""
    first, last = 0, plan["shift"]
    for size, count in plan["passes"]:
        for _ in range(count):
            yield first, last, size
            first, last = first + size, size


def with_cache(step, plan, order, choose):
    """int32 [B, L] in text order. A pass runs the tokens of the previous pass and the masks of this
    one (AR: the previous token, which predicts the next).

    Args:
      step: (token, position, rank, in_context, keys, values, filled) → (logits, keys, values).
    """
    (batch, length), shift = order.shape, plan["shift"]
    blocks, groups, head_width = plan["cache"]
    keys = np.zeros((blocks, batch, length, groups, head_width), np.float32)
    values = np.zeros_like(keys)
    known = np.full((batch, length + shift), plan["mask_id"], np.int32)
    known[:, :shift] = plan["start_token"]
    for first, last, size in passes(plan):
        start, stop = first - last + shift, first + size
        slot = np.tile(np.arange(start, stop, dtype=np.int32), (batch, 1))
        logits, keys, values = step(
            np.ascontiguousarray(known[:, start:stop]),
            np.ascontiguousarray(order[:, start:stop]),
            slot,
            np.ones(slot.shape, bool),
            keys,
            values,
            np.full(batch, start, np.int32),
        )
        known[:, first + shift : stop + shift] = choose(np.asarray(logits)[:, -size:])
    return in_text_order(known[:, shift:], order)


def without_cache(score, plan, order, num_diffusion, choose):
    """int32 [B, L] in text order. Every pass runs the whole text, with masks where it is unknown.

    Args:
      score: (token, position, rank, in_context) → logits.
    """
    batch, length = order.shape
    known = np.full((batch, length), plan["mask_id"], np.int32)
    slot = np.arange(length, dtype=np.int32)[None]
    for first, _, size in passes(plan):
        below = np.minimum(first, num_diffusion)[:, None] if plan["prefix_of_one_rank"] else 0
        rank = np.broadcast_to(np.where(slot < below, 0, slot // plan["rank_block"]), order.shape)
        rank = np.ascontiguousarray(rank, np.int32)
        logits = score(known, order, rank, np.ones(order.shape, bool))
        known[:, first : first + size] = choose(np.asarray(logits)[:, first : first + size])
    return in_text_order(known, order)


def in_text_order(known, order):
    text = np.zeros_like(known)
    np.put_along_axis(text, order, known, axis=1)
    return text
