"""Prompts → a canvas, and decoded token ids → texts."""

from collections.abc import Sequence

import numpy as np

from esolm_jax.sampling.generate import Generator
from esolm_jax.sampling.plan import prompts as prompts_lib
from esolm_jax.sampling.plan.canvas import Canvas, Seed
from esolm_jax.sampling.plan.passes import NEVER


def length_of(config) -> int:
    """L: the number of tokens of a text, from config.sample."""
    return config.sample.length or config.data.seq_len


def make_canvas(config, prompts: Sequence[prompts_lib.Prompt], special, vocab_size: int) -> Canvas:
    """config.sample.num_texts rows of each prompt; without prompts, rows without known tokens.

    Raises:
      UserError: a prompt does not fit.
    """
    s, length = config.sample, length_of(config)
    if not prompts:
        return Canvas.empty(s.num_texts, length, s.seed)
    rows, seeds = [], []
    for prompt in prompts:
        tokens = prompts_lib.complete(prompt, length)
        for n in range(s.num_texts):
            rows.append(tokens)
            own = prompt.seed is not None
            seeds.append(Seed(prompt.seed, n) if own else Seed(s.seed, len(seeds)))
    return Canvas.of(rows, seeds, vocab_size=vocab_size, mask_id=special.mask)


def before_eos(decoded) -> np.ndarray:
    """bool [B, L]: positions before the EOS that ended a text; all of them in other texts."""
    return np.arange(decoded.text.shape[1])[None] < decoded.eos_position[:, None]


def num_generated(decoded) -> int:
    """Generated tokens of all texts, known ones not counted."""
    is_new = (decoded.revealed_at >= 0) & (decoded.revealed_at != NEVER)
    return int((is_new & before_eos(decoded)).sum())


def sample_rows(config, generator: Generator, decoded, tokenizer, *, prompted: bool) -> list[dict]:
    """One JSON-able dict per text: the lines of samples.jsonl.

    Args:
      decoded: the result of Generator.run, as NumPy arrays.
      prompted: whether the canvas is of prompts, config.sample.num_texts rows of each.
    """
    rows, length, order = [], generator.schedule.length, generator.order(decoded)
    for b, ids in enumerate(decoded.text):
        ids = ids[: min(length[b], decoded.eos_position[b])].tolist()
        known, shown = generator.canvas.known[b], ids
        # With one document per window, tokens after EOS are untrained; known ones are kept.
        behind = int(np.flatnonzero(known).max(initial=-1)) + 1
        if config.data.packing == "pad" and tokenizer.eos_id in ids[behind:]:
            shown = ids[: ids.index(tokenizer.eos_id, behind)]
        seed = generator.canvas.seeds[b]
        rows.append(
            {
                "text": tokenizer.decode(shown, bos_is_given=bool(known[0])),
                "prompt": b // config.sample.num_texts if prompted else None,
                "token_ids": ids,
                "seed": [seed.batch, seed.row],
                "ended": bool(decoded.eos_position[b] < length[b]),
                "order": [at for at in order[b].tolist() if at < len(ids)],
            }
        )
    return rows
