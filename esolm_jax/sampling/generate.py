"""Runs config.sample: makes a schedule, and the decoding loop that follows it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.family import registry
from esolm_jax.family.family import Family
from esolm_jax.family.phase import SpecialIds
from esolm_jax.parallel import multihost
from esolm_jax.sampling import published_loops
from esolm_jax.sampling.engine.choose import TokenSampler
from esolm_jax.sampling.engine.network import Network
from esolm_jax.sampling.loops.confidence import Confidence
from esolm_jax.sampling.loops.loop import Decoded, Ends, Loop, Task, row_keys
from esolm_jax.sampling.loops.plain import Plain
from esolm_jax.sampling.loops.speculative import Speculative
from esolm_jax.sampling.plan import passes, schedule
from esolm_jax.sampling.plan.canvas import Canvas

DRAFT_TOKENS = 4  # for sample.draft_tokens=0
NO_ENDS = Ends()

Rules = dict[
    str, tuple[bool, str]
]  # field of config.sample → (whether it is valid, the allowed values)


def loop_name(config) -> str:
    """The loop of config.sample: a key of LOOPS."""
    s = config.sample
    if s.loop != "auto":
        return s.loop
    if registry.get(config.objective).predicts_next:
        return "confidence"
    return "speculative" if s.draft_tokens else "plain"


def _plain(config, task: Task, ends: Ends) -> Loop:
    return Plain(task)


def _speculative(config, task: Task, ends: Ends) -> Loop:
    s = config.sample
    return Speculative(task, s.draft_tokens or DRAFT_TOKENS, s.draft_adaptive, s.draft_style)


def _confidence(config, task: Task, ends: Ends) -> Loop:
    family, s = registry.get(config.objective), config.sample
    return Confidence(
        task,
        family.keeps_cache,
        s.tokens_per_pass,
        s.confidence_threshold,
        predicts_next=family.predicts_next,
    )


# Name → (config, task, EOS and EOT of the tokenizer) → loop.
LOOPS: Mapping[str, Callable[[Any, Task, Ends], Loop]] = {
    "plain": _plain,
    "speculative": _speculative,
    "confidence": _confidence,
    "llada": published_loops.make_llada,
    "dream": published_loops.make_dream,
    "sdar": published_loops.make_sdar,
}
_DECIDES_ORDER = ("confidence", *published_loops.NAMES)


def check(config) -> None:
    """UserError unless the family can be sampled as config.sample says."""
    for rules in (
        _rules_of_family(config),
        _rules_of_schedule(config),
        _rules_of_loop(config),
        published_loops.rules(config, loop_name(config)),
    ):
        for field, (is_right, allowed) in rules.items():
            if not is_right:
                raise UserError(
                    f"config.sample.{field}={config.sample[field]!r}: must be {allowed}"
                )


def _rules_of_family(config) -> Rules:
    s, loop, longest = config.sample, loop_name(config), config.data.seq_len
    family = registry.get(config.objective)
    can = family.schedules or (s.schedule,)
    named = f"with objective {family.name}"
    speculates = loop == "speculative"
    return {
        "schedule": (s.schedule in can, f"one of {', '.join(can)} {named}"),
        "steps": (not (family.no_parallel and s.steps), f"0, {family.no_parallel}, {named}"),
        "length": (
            family.can_extrapolate or (s.length or longest) <= longest,
            f"at most data.seq_len={longest} {named}",
        ),
        "block_length": (
            not family.is_blockwise or s.block_length in (0, config.block_length),
            f"0 or block_length={config.block_length} {named}",
        ),
        "cache_dtype": (family.keeps_cache or s.cache_dtype == "auto", f"auto {named} (no cache)"),
        "draft_tokens": (
            not (family.no_speculation and speculates and s.draft_tokens),
            f"0 {named} ({family.no_speculation})",
        ),
        "loop": (
            _loop_problem(family, loop) == "",
            f"{'confidence' if family.predicts_next else 'plain'} {named} "
            f"({_loop_problem(family, loop)})",
        ),
    }


def _loop_problem(family: Family, loop: str) -> str:
    """Why a family cannot be sampled by one of our own loops, or ""."""
    if loop == "speculative":
        return family.no_speculation
    if loop == "confidence" and not family.has_confidence_order:
        return "it has no confidence order"
    if loop == "plain" and family.predicts_next:
        return "a token is predicted by the one before it"
    return ""


def _rules_of_schedule(config) -> Rules:
    s, positions = config.sample, config.model.max_positions
    return {
        "steps": (
            not (s.schedule == "left_to_right" and s.steps),
            "0 with sample.schedule left_to_right",
        ),
        "length": (
            not positions or (s.length or config.data.seq_len) <= positions,
            f"at most model.max_positions={positions}",
        ),
        "block_length": (
            s.schedule == "blockwise" or loop_name(config) == "llada" or not s.block_length,
            "0 unless sample.schedule is blockwise or sample.loop is llada",
        ),
    }


def _rules_of_loop(config) -> Rules:
    s, loop = config.sample, loop_name(config)
    is_plain, by_confidence, speculates = (
        loop == name for name in ("plain", "confidence", "speculative")
    )
    fixed = f"with sample.loop {loop}"
    return {
        "schedule": (
            loop not in _DECIDES_ORDER or s.schedule == "ancestral",
            f"ancestral {fixed} (the model chooses the order)",
        ),
        "steps": (
            is_plain or loop in published_loops.NAMES or not s.steps,
            f"0 {fixed}"
            + (" (it draws like one token per step)" if speculates else " (see tokens_per_pass)"),
        ),
        "tokens_per_pass": (
            by_confidence or s.tokens_per_pass == 1,
            "1 unless sample.loop is confidence",
        ),
        "confidence_threshold": (
            not s.confidence_threshold
            or loop == "sdar"
            or (by_confidence and s.tokens_per_pass > 1),
            "0 unless sample.loop is sdar, or confidence with sample.tokens_per_pass above 1",
        ),
        "stop_at_eos": (not (by_confidence and s.stop_at_eos), f"False {fixed}"),
        "draft_tokens": (
            speculates or not s.draft_tokens,
            "0 unless sample.loop is speculative or auto",
        ),
        "draft_adaptive": (
            speculates or not s.draft_adaptive,
            "False unless sample.loop is speculative or sample.draft_tokens is set",
        ),
    }


def make_schedule(config, canvas: Canvas) -> schedule.Schedule:
    """The orders and step sizes of config.sample. UserError as check()."""
    check(config)
    s = config.sample
    family = registry.get(config.objective)
    name = family.replaced_schedules.get(s.schedule, s.schedule)
    too_long = canvas.token.shape[1] > config.data.seq_len
    if loop_name(config) in _DECIDES_ORDER:
        name = "left_to_right"  # replaced by the order that the model chooses
    elif name == "ancestral" and too_long:
        name = "blockwise"
    own = config.block_length if family.is_blockwise else config.data.seq_len
    settings = schedule.ScheduleSettings(config.alpha_0, s.steps, s.block_length or own)
    return schedule.make(name, canvas, settings)


@dataclasses.dataclass(frozen=True)
class Generator:
    """Generates the texts of a canvas, any number of times.

    Attributes:
      schedule: the schedule of config.sample for the canvas.
      loop: the loop of config.sample, with the passes of the schedule.
    """

    canvas: Canvas
    schedule: schedule.Schedule
    loop: Loop

    @classmethod
    def of(
        cls, config, canvas: Canvas, special: SpecialIds, *, mesh=None, ends: Ends = NO_ENDS
    ) -> "Generator":
        """UserError if the family cannot generate so, before anything is compiled.

        Args:
          mesh: None = one device.
          ends: of the tokenizer; used if config.sample.stop_at_eos or config.sample.eos.
        """
        s, drawn = config.sample, make_schedule(config, canvas)
        task = Task(
            plan=passes.plan(config, drawn, mask_id=special.mask, start_token=special.start),
            sampler=TokenSampler(
                mask_id=special.mask, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k
            ),
            row_keys=row_keys(canvas.seeds, mesh),
            mesh=mesh,
            eos_id=ends.eos if s.stop_at_eos else None,
            cache_dtype=s.cache_dtype,
        )
        return cls(canvas, drawn, LOOPS[loop_name(config)](config, task, ends))

    @property
    def plan(self) -> passes.DecodePlan:
        """The passes of the schedule."""
        return self.loop.task.plan

    def run(self, network: Network) -> Decoded:
        """Generates the texts; compiles what is new."""
        return self.loop.run(network)

    def compile(self, network: Network) -> Callable[[Network], Decoded]:
        """`run`, compiled ahead of time."""
        return self.loop.compile(network)

    def log_p(self, network: Network, text: np.ndarray) -> np.ndarray:
        """Teacher forcing: float32 [B, L], the log-probability with which the sampler draws each
        token of `text` (int32 [B, L]), given those drawn before it; 0 at known tokens.

        Of the schedule's order, or of the order that the model's confidence chooses. Speculation
        draws from the distribution of the plain loop. No text ends early.
        """
        task = dataclasses.replace(self.loop.task, text=np.asarray(text, np.int32), eos_id=None)
        decides = self.loop.decides_order
        loop = dataclasses.replace(self.loop, task=task) if decides else Plain(task)
        return multihost.to_host(loop.run(network).log_p)

    def order(self, decoded: Decoded) -> np.ndarray:
        """int32 [B, L]: positions as they were generated, the known ones first."""
        return self.loop.order(decoded)

    def is_diffusion(self) -> np.ndarray:
        """bool [B, L]: the positions that the diffusion phase generates."""
        drawn, by_rank = self.schedule, self.schedule.is_diffusion
        if self.loop.decides_order:
            by_rank = np.arange(drawn.order.shape[1])[None] >= drawn.num_known[:, None]
        by_position = np.zeros_like(by_rank)
        np.put_along_axis(by_position, drawn.order, by_rank, axis=1)
        return by_position

    def nfe(self, decoded: Decoded) -> int:
        """The number of function evaluations: passes that generated something."""
        return int(jax.device_get(decoded.passes)) - self.plan.prompt_passes


def draft_figures(decoded: Decoded) -> dict[str, list[int]]:
    """Decoded.drafts, summed over the texts."""
    return {name: np.asarray(n).sum(axis=0).tolist() for name, n in decoded.drafts.items()}
