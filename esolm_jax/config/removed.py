"""Fields that no longer exist."""

import dataclasses

from esolm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Removed:
    """A former field.

    Attributes:
      value: the behaviour of esolm_jax today; a saved config with this value still loads.
      advice: for other values, an imperative sentence.
    """

    value: object
    advice: str


REMOVED: dict[str, Removed] = {}  # by dotted name


def refuse(name: str, source: str = "") -> None:
    """UserError if the field of this dotted name was removed."""
    if name in REMOVED:
        raise UserError(f"{source}config.{name}: was removed; {REMOVED[name].advice}")
