"""Two-phase generation with a KV cache, on any artefact. Needs only numpy.

`s` is the `sampling` section of config.json, with the settings of a run (schedule_esolm.checked),
and `passes` the plan of schedule_esolm.plan_passes. Slot j of a row holds the token of rank j in
the order of generation; with shift = 1 (AR) the start token precedes them. Row b of a batch with a
seed is text b of `python -m esolm_jax.sample` with this seed.

Shapes: B rows, L tokens of a text, S slots of the cache, W window, P predicted tokens, V
vocabulary.
"""

import numpy as np

if __package__:
    from .schedule_esolm import UNREAD
else:
    from schedule_esolm import UNREAD

ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
SMALL_TEMPERATURE, TEMPERATURES = 1e-2, (1e-30, 1e30)
LOWEST = np.float32(-np.inf)


# Draws: JAX's generator, Threefry-2x32.


def threefry(key, counter):
    """uint32 [..., 2], from a key and a counter of broadcastable shapes."""
    k0, k1 = key[..., 0], key[..., 1]
    keys = k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA)
    a, b = counter[..., 0] + k0, counter[..., 1] + k1
    for i in range(5):
        for rotation in ROTATIONS[i % 2]:
            a = a + b
            b = a ^ ((b << np.uint32(rotation)) | (b >> np.uint32(32 - rotation)))
        a = a + keys[(i + 1) % 3]
        b = b + keys[(i + 2) % 3] + np.uint32(i + 1)
    return np.stack([a, b], axis=-1)


def fold_in(key, number):
    """The key uint32 [..., 2] of a key and numbers below 2**32."""
    number = np.asarray(number).astype(np.uint32)
    return threefry(key, np.stack([np.zeros_like(number), number], axis=-1))


def row_keys(seed, batch, first_row=0):
    """uint32 [B, 2]: one key per row, those of the texts from `first_row` on."""
    return fold_in(np.array([[0, seed % 2**32]], np.uint32), first_row + np.arange(batch))


def gumbel(keys, vocab_size):
    """Standard Gumbel noise float32 [..., V], exact in the upper tail."""
    index = np.arange(2 * vocab_size, dtype=np.uint32)
    bits = threefry(keys[..., None, :], np.stack([np.zeros_like(index), index], axis=-1))
    uniform = ((bits[..., 0] ^ bits[..., 1]) >> np.uint32(9)).astype(np.float32)
    uniform *= np.float32(2.0**-23)
    high, low = np.split(uniform, 2, axis=-1)
    fine = high + low * np.float32(2.0**-23) + np.finfo(np.float32).tiny
    return -np.log(-np.log1p(-np.where(high >= 0.5, high, fine)))


def filtered(s, logits):
    """float32 [..., V]: logits of the sampling distribution; −∞ at the mask, below the top_k
    most probable tokens, and outside the smallest set that reaches top_p."""
    logits = np.array(logits, np.float32)
    logits[..., s["mask_id"]] = LOWEST
    if s["temperature"] == 0:
        return logits
    temperature = min(max(s["temperature"], TEMPERATURES[0]), TEMPERATURES[1])
    if temperature < SMALL_TEMPERATURE:  # the logits would overflow
        logits = logits - logits.max(axis=-1, keepdims=True)
    with np.errstate(over="ignore"):
        logits = logits / np.float32(temperature)
    if s["top_k"]:
        kth = -np.sort(-logits, axis=-1)[..., min(s["top_k"], logits.shape[-1]) - 1, None]
        logits = np.where(logits >= kth, logits, LOWEST)
    if s["top_p"] < 1:
        probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
        probs /= probs.sum(axis=-1, keepdims=True)
        falling = -np.sort(-probs, axis=-1)
        before = np.cumsum(falling, axis=-1) - falling
        last = np.maximum(1, np.sum(before < s["top_p"], axis=-1, keepdims=True)) - 1
        logits = np.where(probs >= np.take_along_axis(falling, last, axis=-1), logits, LOWEST)
    return logits


def chooser(s, keys):
    """choose(logits [B, P, V], position [B, P]) → int32 [B, P], with the settings temperature (0 =
    greedy), top_k and top_p of `s`. The mask is never chosen. keys: of row_keys."""
    keys = keys[:, None]

    def choose(logits, position):
        scores = filtered(s, logits)
        if s["temperature"] > 0:
            scores = scores + gumbel(fold_in(keys, position), scores.shape[-1])
        return scores.argmax(axis=-1).astype(np.int32)

    return choose


def without_cache(score):
    """`score` as a step, for models without a cached one: every window is the whole context."""

    def step(token, position, rank, in_context, keys, values, filled):
        return score(token, position, rank, in_context), keys, values

    return step


def run_passes(step, s, passes, rows, choose, *, cache_dtype=np.float32):
    """Generates the unknown tokens of `rows`: int32 [B, L] in text order, −1 where unknown.

    Args:
      step: (token, position, rank, in_context, keys, values, filled) → (logits, keys, values).
      choose: (logits [B, P, V], position [B, P]) → int32 [B, P].
      cache_dtype: of keys and values.

    Returns int32 [B, L], the texts.
    """
    (batch, length), shift, mask_id = rows.shape, s["shift"], s["mask_id"]
    widths = (passes.end - passes.start).max(axis=1, initial=1)
    spare = shift + int(widths.max(initial=1))
    by_rank = np.take_along_axis(rows, passes.order, axis=1)
    known = np.pad(np.where(by_rank < 0, mask_id, by_rank), ((0, 0), (shift, spare - shift)))
    known = known.astype(np.int32)
    known[:, :shift] = s["start_token"]
    order = np.pad(passes.order, ((0, 0), (0, spare))).astype(np.int32)
    blocks, groups, head_width = s["cache"]
    shape = (blocks, batch, length + spare if s["has_step"] else 1, groups, head_width)
    keys, values = np.zeros(shape, cache_dtype), np.zeros(shape, cache_dtype)
    tables = passes.start, passes.first, passes.size, passes.end, passes.below
    for i, width in enumerate(widths.tolist()):
        start, first, size, end, below = (table[i][:, None] for table in tables)
        slot = (start + np.arange(width)[None]).astype(np.int32)
        rank = np.where(slot < below, 0, slot // s["rank_block"])
        rank = np.where(slot < end, rank, UNREAD).astype(np.int32)
        token = np.where(slot < first + shift, np.take_along_axis(known, slot, axis=1), mask_id)
        position = np.take_along_axis(order, slot, axis=1)
        labels = token.astype(np.int32), position, rank, np.ones(slot.shape, bool)
        logits, keys, values = step(*labels, keys, values, start[:, 0].astype(np.int32))
        column = np.arange(int(size.max()))[None]
        if not column.size:
            continue
        pick = np.minimum(first - start + column, width - 1)
        logits = np.take_along_axis(np.asarray(logits), pick[..., None], axis=1)
        chosen = choose(logits, np.take_along_axis(position, pick, axis=1))
        place = first + shift + column
        chosen = np.where(column < size, chosen, np.take_along_axis(known, place, axis=1))
        np.put_along_axis(known, place, chosen.astype(np.int32), axis=1)
    texts = np.zeros_like(rows)
    np.put_along_axis(texts, passes.order, known[:, shift : shift + length], axis=1)
    return texts
