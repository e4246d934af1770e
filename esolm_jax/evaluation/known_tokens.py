"""Labels of texts of which some tokens are known and the others masked."""

import numpy as np
from ml_collections import ConfigDict

from esolm_jax.errors import UserError
from esolm_jax.family import registry
from esolm_jax.family.labels import Tokens
from esolm_jax.interop.published import names as published_names
from esolm_jax.model.build import BuiltModel
from esolm_jax.sampling.plan import passes, schedule
from esolm_jax.sampling.plan.canvas import MASK, Canvas, Seed


def label(config: ConfigDict, built: BuiltModel, ids: np.ndarray) -> Tokens:
    """Tokens of ids int [B, L], the mask id where unknown, as in the first step of left-to-right
    sampling: unknown tokens come last in the order. Each row has every position once.

    Raises:
      UserError: an id is not in the vocabulary, a text of eso_a or eso_b has no mask, or the known
        tokens of an ar text are not at the start.
    """
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"tokens: {ids.dtype} {ids.shape}: must be integers [B, L]")
    special, vocab_size = built.special, built.model.vocab_size
    rows = np.where(ids == special.mask, MASK, ids).tolist()
    seeds = [Seed(0, b) for b in range(len(rows))]
    canvas = Canvas.of(rows, seeds, vocab_size=vocab_size, mask_id=special.mask)
    family = registry.get(config.objective)
    if family.ranks_by_position:
        place = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        span = family.rank_span(ids.shape[1], config.block_length)
        return published_names.as_tokens(ids, place, place // span, np.ones_like(ids, bool))
    plan = passes.plan(
        config,
        schedule.left_to_right(canvas),
        mask_id=special.mask,
        start_token=special.start,
    )
    complete = canvas.known.all(axis=1)
    if complete.any() and not plan.shift:
        raise UserError(f"tokens: text {complete.argmax()}: must have a mask (id {special.mask})")
    slot = np.arange(ids.shape[1])[None]
    token = np.where(slot < plan.num_known[:, None], plan.known, plan.unknown)
    if plan.shift:
        token = np.insert(token[:, :-1], 0, plan.start_token, axis=1)
    first = plan.bidirectional_below[plan.prompt_passes :][:1].T
    rank = np.broadcast_to(plan.rank, ids.shape)
    rank = np.where(slot < first, 0, rank) if first.size else rank
    return published_names.as_tokens(token, plan.order, rank, np.ones_like(rank, bool))
