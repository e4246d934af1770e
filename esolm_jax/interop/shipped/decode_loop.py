"""Two-phase generation, one token a pass, around any artefact. Needs numpy alone.

`plan` is the `sampling` section of config.json. Slot j of a row holds the token of rank j in the
order of generation; with shift = 1 (AR) the start token lies before them.
"""

import numpy as np


def draw_orders(rng, plan, batch):
    """(order int32 [B, L], the position generated at each rank; how many of them are of the
    diffusion phase, int32 [B]): those come in random order, the rest left to right."""
    shape, position = (batch, plan["length"]), np.arange(plan["length"])[None]
    later = rng.random(shape) >= plan["alpha_0"]
    within = np.where(later, position, rng.random(shape))
    block = np.broadcast_to(position // plan["order_block"], shape)
    order = np.lexsort((within, later, block), axis=-1).astype(np.int32)
    return order, np.sum(~later, axis=1).astype(np.int32)


def chooser(plan, temperature=0.0, rng=None):
    """choose(logits [B, V]) → int32 [B]; temperature 0 = greedy. The mask is never chosen."""

    def choose(logits):
        logits = logits.astype(np.float64)
        logits[:, plan["mask_id"]] = -np.inf
        if temperature > 0:
            logits = logits / temperature + rng.gumbel(size=logits.shape)
        return logits.argmax(axis=-1).astype(np.int32)

    return choose


def with_cache(step, plan, order, choose):
    """int32 [B, L] in text order. A pass runs the token of the last one and the mask of this one
    (AR: the token of the last one, which predicts the next).

    Args:
      step: (token, position, rank, in_context, keys, values, filled) → (logits, keys, values).
    """
    (batch, length), shift = order.shape, plan["shift"]
    blocks, groups, head_width = plan["cache"]
    keys = np.zeros((blocks, batch, length, groups, head_width), np.float32)
    values = np.zeros_like(keys)
    known = np.full((batch, length + 1), plan["mask_id"], np.int32)
    known[:, :shift] = plan["start_token"]
    for first in range(length):
        start = max(first - 1 + shift, 0)
        slot = np.broadcast_to(
            np.arange(start, first + 1, dtype=np.int32), (batch, first + 1 - start)
        )
        logits, keys, values = step(
            np.take_along_axis(known, slot, axis=1),
            np.take_along_axis(order, slot, axis=1),
            np.ascontiguousarray(slot),
            np.ones(slot.shape, bool),
            keys,
            values,
            np.full(batch, start, np.int32),
        )
        known[:, first + shift] = choose(np.asarray(logits)[:, -1])
    return in_text_order(known[:, shift : shift + length], order)


def without_cache(score, plan, order, num_diffusion, choose):
    """int32 [B, L] in text order. Every pass runs the whole text, what is not known as masks.

    Args:
      score: (token, position, rank, in_context) → logits.
    """
    batch, length = order.shape
    known = np.full((batch, length), plan["mask_id"], np.int32)
    slot = np.arange(length, dtype=np.int32)[None]
    for first in range(length):
        below = np.minimum(first, num_diffusion)[:, None] if plan["prefix_of_one_rank"] else 0
        rank = np.broadcast_to(np.where(slot < below, 0, slot // plan["rank_block"]), order.shape)
        rank = np.ascontiguousarray(rank, np.int32)
        logits = score(known, order, rank, np.ones(order.shape, bool))
        known[:, first] = choose(np.asarray(logits)[:, first])
    return in_text_order(known, order)


def in_text_order(known, order):
    text = np.zeros_like(known)
    np.put_along_axis(text, order, known, axis=1)
    return text
