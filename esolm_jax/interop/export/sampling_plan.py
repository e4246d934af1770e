"""The sampling plan of a family as data, for programs in any runtime."""

import dataclasses
import itertools

import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.family import registry
from esolm_jax.sampling import generate
from esolm_jax.sampling.plan.canvas import Canvas
from esolm_jax.training.restore import TrainedModel


@dataclasses.dataclass(frozen=True)
class Plan:
    """Attributes:
    sizes: tokens that each pass generates; they sum to the length.
    order: int32 [L], the position generated at each rank; None = drawn for each row, two-phase.
    num_diffusion: how many of a fixed order are the diffusion phase's.
    about: JSON-able, the `sampling` section of config.json:
      objective, alpha_0, length, mask_id, start_token;
      cached: passes run only new tokens; else the whole text;
      shift: 1 = a token's slot predicts the next (AR);
      rank_block: slots of one rank; prefix_of_one_rank: diffusion tokens that are known have
        rank 0;
      order_block: blocks of the text are generated one after the other;
      cache: [blocks, G, K];
      schedule, temperature, top_k, top_p: settings of config.sample, used by every runtime;
        schedule_note: the difference from config.sample's schedule, or "";
      passes: [tokens, count] of runs of equal passes;
      order, num_diffusion: the attributes above, order as a list.
    """

    sizes: tuple[int, ...]
    order: np.ndarray | None
    num_diffusion: int | None
    about: dict


def _of_family(config, length: int) -> dict:
    family = registry.get(config.objective)
    return {
        "cached": family.export.cached,
        "shift": int(family.is_shifted),
        "rank_block": family.rank_span(length, config.block_length),
        "prefix_of_one_rank": family.export.prefix_of_one_rank,
        "order_block": family.order_span(length, config.block_length),
    }


def step_note(config) -> str:
    """A note on this family for callers of the cached step, or ""."""
    return registry.get(config.objective).export.step_note


def no_step(config) -> str:
    """Why there is no cached step, or ""."""
    return registry.get(config.objective).export.no_step


def no_sampler(config) -> str:
    """Why config.sample cannot be exported as one program, or ""."""
    s = config.sample
    try:
        generate.check(config)
    except UserError as error:
        return str(error)
    length = s.length or config.data.seq_len
    fine = s.schedule == "left_to_right"
    fine |= s.schedule == "strided"
    fine |= s.schedule == "ancestral" and s.steps == 0 and length <= config.data.seq_len
    if not fine or generate.loop_name(config) != "plain" or s.stop_at_eos:
        return (
            f"config.sample.schedule={s.schedule!r} with sample.loop={generate.loop_name(config)}, "
            f"steps={s.steps}, stop_at_eos={s.stop_at_eos}, {length} tokens: the exported sampler "
            "is the plain loop, left_to_right, strided, or ancestral with steps=0 (one token per "
            f"pass) up to data.seq_len={config.data.seq_len}, without stop_at_eos"
        )
    return ""


def make(config, trained: TrainedModel, *, with_schedule: bool) -> Plan:
    """The plan of config.sample; without its schedule, of one token a pass."""
    model, special = trained.built.model, trained.built.special
    length = (config.sample.length if with_schedule else 0) or config.data.seq_len
    s = config.sample
    schedule = s.schedule if with_schedule else "ancestral"
    note = (
        ""
        if with_schedule
        else f"one token a pass instead of config.sample's: {no_sampler(config)}"
    )
    about = {
        "objective": config.objective,
        "alpha_0": 0.0 if schedule == "left_to_right" else config.alpha_0,
        "length": length,
        "mask_id": special.mask,
        "start_token": special.start,
        **_of_family(config, length),
        "cache": [model.blocks, model.groups, model.head_width],
        "schedule": schedule,
        "schedule_note": note,
        "temperature": s.temperature,
        "top_k": s.top_k,
        "top_p": s.top_p,
    }
    sizes, order, num_diffusion = (1,) * length, None, None
    if schedule == "strided":
        drawn = generate.make_schedule(config, Canvas.empty(1, length, 0))
        sizes = tuple(drawn.sizes[:, 0].tolist())
        order, num_diffusion = drawn.order[0], int(drawn.num_diffusion[0])
    about["passes"] = [[size, len(list(run))] for size, run in itertools.groupby(sizes)]
    about["order"] = None if order is None else order.tolist()
    about["num_diffusion"] = num_diffusion
    return Plan(sizes, order, num_diffusion, about)
