"""What config.sample asks for, carried out: a schedule, and the loop that follows it."""

import dataclasses

import jax
import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.objectives import Special
from esolm_jax.sampling import decode, passes, schedule
from esolm_jax.sampling.canvas import Canvas
from esolm_jax.sampling.choose import Choice
from esolm_jax.sampling.confident import confident
from esolm_jax.sampling.decode import Decoded
from esolm_jax.sampling.network import Network
from esolm_jax.sampling.speculate import speculate


def check(config) -> None:
    """UserError unless the family can be sampled as config.sample says."""
    s, objective = config.sample, config.objective
    length = s.length or config.data.seq_len

    def refuse(field: str, allowed: str):
        value = s[field]
        raise UserError(
            f"config.sample.{field}={value!r}: must be {allowed} with objective {objective}"
        )

    can = {
        "ar": ("ancestral", "left_to_right"),
        "bd3": ("ancestral", "left_to_right", "blockwise"),
        "eso_a": ("ancestral", "strided", "shuffled_strided", "left_to_right"),
        "mdlm": ("ancestral", "strided", "shuffled_strided", "left_to_right", "confidence"),
    }
    if s.schedule not in can.get(objective, (s.schedule,)):
        refuse("schedule", "one of " + ", ".join(can[objective]))
    if objective == "ar" and s.steps:
        raise UserError(
            f"config.sample.schedule={s.schedule!r}, sample.steps={s.steps}: objective ar "
            "generates left to right, one token per step; leave both at their defaults"
        )
    if s.schedule in ("left_to_right", "confidence") and s.steps:
        raise UserError(
            f"config.sample.steps={s.steps}: must be 0 with sample.schedule {s.schedule}"
        )
    of_confidence = {"confident": 1, "threshold": 0.0}
    for name, default in of_confidence.items():
        if s.schedule != "confidence" and s[name] != default:
            raise UserError(
                f"config.sample.{name}={s[name]}: is for sample.schedule confidence; must be "
                f"{default} with {s.schedule}"
            )
    if s.threshold and s.confident == 1:
        raise UserError(
            f"config.sample.threshold={s.threshold}: chooses among sample.confident tokens, which "
            "must be more than 1"
        )
    if s.schedule == "confidence" and s.stop_at_eos:
        raise UserError(
            "config.sample.stop_at_eos=True: must be False with sample.schedule confidence"
        )
    if s.speculate_adaptive and not s.speculate:
        raise UserError(
            "config.sample.speculate_adaptive=True: must be False unless sample.speculate is given"
        )
    if objective in ("mdlm", "eso_a") and length > config.data.seq_len:
        refuse("length", f"at most data.seq_len={config.data.seq_len}")
    positions = config.model.positions
    if positions and length > positions:
        raise UserError(
            f"config.sample.length={s.length!r}: must be at most model.positions={positions}, for "
            "there are no more"
        )
    if s.block and s.schedule != "blockwise":
        raise UserError(f"config.sample.block={s.block}: is for sample.schedule blockwise")
    if objective == "bd3" and s.block not in (0, config.block_length):
        refuse("block", f"0 or block_length={config.block_length}")
    if s.speculate and objective != "eso_b":
        why = "no mask to draft with" if objective == "ar" else "known tokens read later ones"
        refuse("speculate", f"0, for it has {why},")
    if s.speculate and (s.steps or s.schedule == "confidence"):
        raise UserError(
            f"config.sample.speculate={s.speculate}: draws as one token per step does, so "
            "sample.steps must be 0, and sample.schedule not confidence"
        )


def make_schedule(config, canvas: Canvas) -> schedule.Schedule:
    """The orders and step sizes that config.sample asks for. UserError as check()."""
    check(config)
    s = config.sample
    if config.objective == "ar" or s.schedule in ("left_to_right", "confidence"):
        return schedule.left_to_right(canvas)
    if config.objective == "bd3":
        return schedule.blockwise(canvas, config.block_length, 1.0, s.steps)
    too_long = canvas.token.shape[1] > config.data.seq_len
    if s.schedule == "blockwise" or (s.schedule == "ancestral" and too_long):
        block = s.block or config.data.seq_len
        return schedule.blockwise(canvas, block, config.alpha_0, s.steps)
    if s.schedule == "ancestral":
        return schedule.ancestral(canvas, config.alpha_0, s.steps)
    shuffle = s.schedule == "shuffled_strided"
    return schedule.strided(canvas, config.alpha_0, s.steps, shuffle=shuffle)


@dataclasses.dataclass(frozen=True)
class Generator:
    """A plan for a canvas, to be run as often as wanted.

    Attributes:
      schedule, passes: what `config.sample` makes of the canvas.
    """

    config: object
    canvas: Canvas
    schedule: schedule.Schedule
    passes: passes.Passes
    choice: Choice

    @classmethod
    def of(cls, config, canvas: Canvas, special: Special) -> "Generator":
        """UserError if the family cannot generate so, before anything is compiled."""
        s, drawn = config.sample, make_schedule(config, canvas)
        plan = passes.plan(config, drawn, mask_id=special.mask, start_token=special.start)
        choice = Choice(
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
                cached=self.config.objective == "eso_b",
                most=s.confident,
                threshold=s.threshold,
                **common,
            )
            return found, {}
        eos_id = eos_id if s.stop_at_eos else None
        if not s.speculate:
            return decode.decode(*args, eos_id=eos_id, **common), {}
        found, counts = speculate(
            *args, k=s.speculate, adaptive=s.speculate_adaptive, style=s.speculate_style,
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
