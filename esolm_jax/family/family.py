"""Family: all that distinguishes one family from another, in one object."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.family.labels import LabelledBatch
from esolm_jax.family.phase import Phase, PhaseSettings


class GenerationSteps(Protocol):
    """The part of a sampling schedule (sampling/plan/schedule.py) that a family reads.

    Attributes:
      order: [B, L], the position at each rank. sizes: [steps, B], tokens generated in each step.
      num_known: [B], how many leading ranks are known. length: [B], tokens of each text.
      num_diffusion: [B], how many leading ranks are known or in the diffusion phase.
      first: [steps, B], the first rank that a step generates.
      new_context: [steps, B], the first rank that the previous step generated.
    """

    order: np.ndarray
    sizes: np.ndarray
    num_known: np.ndarray
    length: np.ndarray
    num_diffusion: np.ndarray
    first: np.ndarray
    new_context: np.ndarray


@dataclasses.dataclass(frozen=True)
class Windows:
    """The slots that each decoding pass runs; slot j holds the token of rank j in the order.

    Attributes:
      prefill: [B], number of known slots that are cached before the first step.
      start, end: [steps, B] or broadcastable: a pass runs the slots [start, end).
      rank: [L], the rank of each slot. bidirectional_below: slots below it have rank 0;
        [steps, B], or 0.
    """

    prefill: np.ndarray
    start: np.ndarray
    end: np.ndarray
    rank: np.ndarray
    bidirectional_below: np.ndarray | int = 0


@dataclasses.dataclass(frozen=True)
class Work:
    """The expected work of one row of a phase, or of several rows.

    Attributes:
      tokens: tokens that the blocks process, without query copies that have no loss.
      predicted: tokens that the head projects on the vocabulary.
      pairs: pairs of a query and a visible key.
    """

    tokens: float
    predicted: float
    pairs: float

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.tokens + other.tokens, self.predicted + other.predicted, self.pairs + other.pairs
        )

    def __mul__(self, rows: float) -> "Work":
        return Work(self.tokens * rows, self.predicted * rows, self.pairs * rows)


@dataclasses.dataclass(frozen=True)
class Export:
    """Settings for exported artefacts (interop/export).

    Attributes:
      cached: the shipped loop runs new tokens only; otherwise the whole text in each pass.
      prefix_of_one_rank: known tokens of the diffusion phase have rank 0.
      no_step: why there is no cached step function, or "".
      step_note: a note for callers of the cached step, or "".
    """

    cached: bool = False
    prefix_of_one_rank: bool = False
    no_step: str = ""
    step_note: str = ""


def one_token(length: int, block_length: int) -> int:
    """Each token has its own rank."""
    return 1


def one_block(length: int, block_length: int) -> int:
    """The tokens of a block share a rank."""
    return block_length


def whole_text(length: int, block_length: int) -> int:
    """All tokens share a rank."""
    return length


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models. The model, the loss and the sampling loops read nothing else of it.

    Attributes:
      name: the value of config.objective.
      phases: the terms of its loss.
      windows: (schedule, block_length) → the windows of its decoding passes. Raises UserError if
        the family cannot follow the schedule.
      work: (phase, length, alpha_0, block_length) → the expected Work of one row, for lower bounds.
      fixed_alpha_0: the only allowed α₀, or None.
      rank_span: (length, block_length) → how many tokens share a rank.
      order_span: likewise → length of the parts of the text that are generated one after the other.
      schedules: supported values of config.sample.schedule; () = all.
      replaced_schedules: schedule → the one that this family uses instead.
      is_shifted: slot j holds text token j − 1 and predicts token j.
      predicts_next: the row of a token predicts the token after it (the first row also the first
        token), but slot j holds text token j.
      keeps_cache: known tokens stay in the cache; otherwise each pass recomputes them.
      can_extrapolate: texts may be longer than data.seq_len.
      no_parallel: why a step generates one token only, or "".
      no_speculation: why it cannot speculate, or "".
      has_confidence_order: whether the model's confidence may choose the generation order.
      has_any_order_likelihood: whether config.eval.num_orders may ask for the importance-weighted
        bound.
      label_in_order: (x, valid, masked, order, special) → LabelledBatch of all masked tokens, each
        predicted from those before it in the order, by one pass; None: they take a pass each.
      export: how exported artefacts decode.
    """

    name: str
    phases: Callable[[PhaseSettings], tuple[Phase, ...]]
    windows: Callable[[GenerationSteps, int], Windows]
    work: Callable[[Phase, int, float, int], Work]
    fixed_alpha_0: float | None = None
    rank_span: Callable[[int, int], int] = one_token
    order_span: Callable[[int, int], int] = whole_text
    schedules: tuple[str, ...] = ()
    replaced_schedules: dict[str, str] = dataclasses.field(default_factory=dict)
    is_shifted: bool = False
    predicts_next: bool = False
    keeps_cache: bool = True
    can_extrapolate: bool = True
    no_parallel: str = ""
    no_speculation: str = ""
    has_confidence_order: bool = False
    has_any_order_likelihood: bool = False
    label_in_order: Callable[..., LabelledBatch] | None = None
    export: Export = Export()

    @property
    def is_blockwise(self) -> bool:
        """Whether the family uses config.block_length, which must then divide data.seq_len."""
        return self.rank_span is one_block

    @property
    def ranks_by_position(self) -> bool:
        """Whether the rank of a token follows from its position alone: blocks, or the whole text,
        of one rank."""
        return self.rank_span is not one_token

    @property
    def has_two_phases(self) -> bool:
        """Whether α₀ interpolates between a diffusion and a sequential phase."""
        return self.fixed_alpha_0 is None


def refuse(is_wrong_B: np.ndarray, reason: str) -> None:
    """UserError that names the first wrong text, if any."""
    if is_wrong_B.any():
        raise UserError(f"text {is_wrong_B.argmax()} (counted from 0): {reason}")
