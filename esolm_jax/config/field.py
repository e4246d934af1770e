"""Field: the declaration of one field of the config."""

import dataclasses
from collections.abc import Callable, Mapping

from esolm_jax.config.checks import Check

Value = bool | int | float | str


@dataclasses.dataclass(frozen=True)
class Field:
    """One field. Its name is its key in the table of its section.

    Attributes:
      default: the value if a config file does not set it; its type is the type of the field.
      doc: one line for docs/config.md.
      check: which values are allowed; None = all of the type.
      fixes_weights: weights trained with one value cannot be used with another.
      may_change_on_resume: a resumed run may set another value.
      formerly: earlier names within the same section.
      former_values: for each value that is no longer allowed, what to set instead: values by dotted
        name, of this field and possibly of others in its section.
      before: the value that a config saved before the field existed stands for, or a function that
        derives it from the other saved values, by dotted name, under today's names; None = the
        field has existed since schema 1.
    """

    default: Value
    doc: str
    check: Check | None = None
    fixes_weights: bool = False
    may_change_on_resume: bool = False
    formerly: tuple[str, ...] = ()
    former_values: Mapping[str, Mapping[str, Value]] = dataclasses.field(default_factory=dict)
    before: Value | Callable[[Mapping[str, Value]], Value] | None = None


def as_text(values: Mapping[str, object]) -> str:
    """Values by dotted name, for a message: config.a.b=1, config.a.c=2."""
    return ", ".join(f"config.{name}={value}" for name, value in values.items())
