"""Field: the declaration of one field of the config."""

import dataclasses

from esolm_jax.config.checks import Check


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
      before: the value that a config saved before the field existed stands for; None = the field
        has existed since schema 1.
    """

    default: bool | int | float | str
    doc: str
    check: Check | None = None
    fixes_weights: bool = False
    may_change_on_resume: bool = False
    formerly: tuple[str, ...] = ()
    before: bool | int | float | str | None = None
