"""How a family generates, and config.sample, as data for programs in any runtime.

The section `sampling` of config.json, in all exported folders. shipped/schedule_esolm.py makes
orders and passes from it.
"""

from typing import Any

from esolm_jax.config import SCHEDULES
from esolm_jax.errors import UserError
from esolm_jax.family import registry
from esolm_jax.family.phase import SpecialIds
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.sampling import generate

ANY_LENGTH = 2**20  # tokens of a text, if the model has no limit


def of_config(config) -> dict[str, Any]:
    """How the family labels tokens, and the settings of config.sample:

    objective; cached: a token reads lower ranks only; shift: 1 = a token's slot predicts the next
      (AR); rank_block: slots of one rank; prefix_of_one_rank: diffusion tokens that are known have
      rank 0; one_token: one token per pass only;
    fixed_alpha_0, schedules, replaced_schedules, trained_length, max_length: limits of settings;
    length, alpha_0, schedule, steps, block_length, temperature, top_k, top_p: the settings.
    """
    s, family, seq_len = config.sample, registry.get(config.objective), config.data.seq_len
    own = config.block_length if family.is_blockwise else seq_len
    longest = config.model.max_positions or ANY_LENGTH
    return {
        "objective": config.objective,
        "cached": family.export.cached,
        "shift": int(family.is_shifted),
        "rank_block": family.rank_span(seq_len, config.block_length),
        "prefix_of_one_rank": family.export.prefix_of_one_rank,
        "one_token": bool(family.no_parallel),
        "fixed_alpha_0": family.fixed_alpha_0,
        "schedules": list(family.schedules or SCHEDULES[:5]),
        "replaced_schedules": family.replaced_schedules,
        "trained_length": seq_len,
        "max_length": longest if family.can_extrapolate else seq_len,
        "length": s.length or seq_len,
        "alpha_0": config.alpha_0,
        "schedule": s.schedule,
        "steps": s.steps,
        "block_length": s.block_length or own,
        "temperature": s.temperature,
        "top_k": s.top_k,
        "top_p": s.top_p,
    }


def of_artefacts(config, model: ModelConfig, special: SpecialIds, onnx_cache_dtype: str) -> dict:
    """of_config, and what loops over the artefacts need: mask_id, start_token, vocab_size;
    cache: [blocks, G, K]; onnx_cache_dtype: of step.onnx; has_step; note: the difference from
    config.sample, or ""."""
    return of_config(config) | {
        "mask_id": special.mask,
        "start_token": special.start,
        "vocab_size": model.vocab_size,
        "cache": [model.blocks, model.groups, model.head_width],
        "onnx_cache_dtype": onnx_cache_dtype,
        "has_step": not no_step(config),
        "note": note(config),
    }


def step_note(config) -> str:
    """A note on this family for callers of the cached step, or ""."""
    return registry.get(config.objective).export.step_note


def no_step(config) -> str:
    """Why there is no cached step, or ""."""
    return registry.get(config.objective).export.no_step


def note(config) -> str:
    """What config.sample has that exported samplers leave out, or ""."""
    s = config.sample
    try:
        generate.check(config)
    except UserError as error:
        return str(error)
    left_out = {
        "loop": (s.loop, generate.loop_name(config) in ("plain", "speculative")),
        "stop_at_eos": (s.stop_at_eos, not s.stop_at_eos),
    }
    named = [f"sample.{name}={value}" for name, (value, fine) in left_out.items() if not fine]
    return f"samples without {', '.join(named)}" if named else ""
