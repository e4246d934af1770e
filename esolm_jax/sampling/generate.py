"""What config.sample asks for, carried out: a schedule, and the loop that follows it."""

import dataclasses

import jax
import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.family import registry
from esolm_jax.family.phase import SpecialIds
from esolm_jax.sampling.engine.choose import TokenSampler
from esolm_jax.sampling.engine.network import Network
from esolm_jax.sampling.loops import decode
from esolm_jax.sampling.loops.confident import confident
from esolm_jax.sampling.loops.decode import Decoded
from esolm_jax.sampling.loops.speculate import speculate
from esolm_jax.sampling.plan import passes, schedule
from esolm_jax.sampling.plan.canvas import Canvas


def check(config) -> None:
    """UserError unless the family can be sampled as config.sample says."""
    s, positions = config.sample, config.model.max_positions
    family = registry.get(config.objective)
    can = family.schedules or (s.schedule,)
    length, longest = s.length or config.data.seq_len, config.data.seq_len
    named = f"with objective {family.name}"
    of_family = {
        "schedule": (s.schedule in can, f"one of {', '.join(can)} {named}"),
        "steps": (not (family.no_parallel and s.steps), f"0, {family.no_parallel}, {named}"),
        "length": (
            family.can_extrapolate or length <= longest,
            f"at most data.seq_len={longest} {named}",
        ),
        "block_length": (
            not family.is_blockwise or s.block_length in (0, config.block_length),
            f"0 or block_length={config.block_length} {named}",
        ),
        "draft_tokens": (
            not (family.no_speculation and s.draft_tokens),
            f"0, for it has {family.no_speculation}, {named}",
        ),
    }
    _check(s, of_family)
    by_confidence, fixed = s.schedule == "confidence", f"with sample.schedule {s.schedule}"
    one_a_step = by_confidence or s.schedule == "left_to_right"
    of_others = {
        "steps": (not (one_a_step and s.steps), f"0 {fixed}"),
        "length": (
            not positions or length <= positions,
            f"at most model.max_positions={positions}, for there are no more",
        ),
        "block_length": (
            s.schedule == "blockwise" or not s.block_length,
            "0 unless sample.schedule is blockwise",
        ),
        "tokens_per_pass": (by_confidence or s.tokens_per_pass == 1, f"1 {fixed}"),
        "confidence_threshold": (
            not s.confidence_threshold or (by_confidence and s.tokens_per_pass > 1),
            "0 unless sample.schedule is confidence, and sample.tokens_per_pass above 1",
        ),
        "stop_at_eos": (not (by_confidence and s.stop_at_eos), f"False {fixed}"),
        "draft_tokens": (
            not s.draft_tokens or not (s.steps or by_confidence),
            "0, for it draws as one token per step does, unless sample.steps is 0, and "
            "sample.schedule not confidence",
        ),
        "speculate_adaptive": (
            bool(s.draft_tokens) or not s.speculate_adaptive,
            "False without sample.draft_tokens",
        ),
    }
    _check(s, of_others)


def _check(settings, rules: dict[str, tuple[bool, str]]) -> None:
    for field, (is_right, allowed) in rules.items():
        if not is_right:
            raise UserError(f"config.sample.{field}={settings[field]!r}: must be {allowed}")


def make_schedule(config, canvas: Canvas) -> schedule.Schedule:
    """The orders and step sizes that config.sample asks for. UserError as check()."""
    check(config)
    s = config.sample
    family = registry.get(config.objective)
    name = family.replaced_schedules.get(s.schedule, s.schedule)
    too_long = canvas.token.shape[1] > config.data.seq_len
    if name == "ancestral" and too_long:
        name = "blockwise"
    own = config.block_length if family.is_blockwise else config.data.seq_len
    settings = schedule.ScheduleSettings(config.alpha_0, s.steps, s.block_length or own)
    return schedule.make(name, canvas, settings)


@dataclasses.dataclass(frozen=True)
class Generator:
    """A plan for a canvas, to be run as often as wanted.

    Attributes:
      schedule, passes: what `config.sample` makes of the canvas.
    """

    config: object
    canvas: Canvas
    schedule: schedule.Schedule
    passes: passes.DecodePlan
    choice: TokenSampler

    @classmethod
    def of(cls, config, canvas: Canvas, special: SpecialIds) -> "Generator":
        """UserError if the family cannot generate so, before anything is compiled."""
        s, drawn = config.sample, make_schedule(config, canvas)
        plan = passes.plan(config, drawn, mask_id=special.mask, start_token=special.start)
        choice = TokenSampler(
            mask_id=special.mask, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k
        )
        return cls(config, canvas, drawn, plan, choice)

    def run(self, network: Network, *, mesh=None, eos_id=None, dry_run=False):
        """(Decoded, figures of speculation as lists); with dry_run only compiles."""
        s, keys = self.config.sample, decode.row_keys(self.canvas.seeds)
        common = {"mesh": mesh, "dry_run": dry_run}
        args = network, self.passes, self.choice, keys
        if s.schedule == "confidence":
            found = confident(
                *args,
                cached=registry.get(self.config.objective).keeps_cache,
                most=s.tokens_per_pass,
                threshold=s.confidence_threshold,
                **common,
            )
            return found, {}
        eos_id = eos_id if s.stop_at_eos else None
        if not s.draft_tokens:
            return decode.decode(*args, eos_id=eos_id, **common), {}
        found, counts = speculate(
            *args, k=s.draft_tokens, adaptive=s.speculate_adaptive, style=s.speculate_style,
            eos_id=eos_id, **common,
        )  # fmt: skip
        return found, {name: np.asarray(n).sum(axis=0).tolist() for name, n in counts.items()}

    def order(self, decoded: Decoded) -> np.ndarray:
        """int32 [B, L]: positions as they were generated, after what was given; where confidence
        decides, those of one pass from left to right."""
        if self.config.sample.schedule == "confidence":
            return np.argsort(decoded.revealed, axis=1, kind="stable").astype(np.int32)
        return self.schedule.order

    def is_diffusion(self) -> np.ndarray:
        """bool [B, L]: what the diffusion phase generates, by position."""
        drawn, by_rank = self.schedule, self.schedule.is_diffusion
        if self.config.sample.schedule == "confidence":
            by_rank = np.arange(drawn.order.shape[1])[None] >= drawn.given[:, None]
        found = np.zeros_like(by_rank)
        np.put_along_axis(found, drawn.order, by_rank, axis=1)
        return found


def passes_run(generator: Generator, decoded: Decoded) -> int:
    """The NFE: passes that generated something."""
    return int(jax.device_get(decoded.passes)) - generator.passes.prompt_passes
