"""The families by name. A new family is one file and one name here (or one call of `register`).

Imports no JAX: the file of a family is imported when the family is first used.
"""

import importlib
from typing import TYPE_CHECKING

from esolm_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from esolm_jax.family.family import Family

_FAMILIES: dict[str, "Family | None"] = dict.fromkeys(("ar", "mdlm", "bd3", "eso_a", "eso_b"))
NAMES = _FAMILIES.keys()  # all allowed values of config.objective, those of `register` too


def register(family: "Family") -> "Family":
    """Adds a family; config.objective can then name it. ValueError if the name is taken."""
    if family.name in _FAMILIES:
        raise ValueError(f"family {family.name!r}: is registered already")
    _FAMILIES[family.name] = family
    return family


def unregister(name: str) -> None:
    """Removes a family, such as one of a test."""
    del _FAMILIES[name]


def get(name: str) -> "Family":
    """The family of config.objective. UserError: there is none of this name."""
    if name not in _FAMILIES:
        raise UserError(
            f"config.objective={name!r}: must be one of {', '.join(NAMES)}{nearest(name, NAMES)}"
        )
    family = _FAMILIES[name]
    if family is None:
        family = importlib.import_module(f"esolm_jax.family.{name}").FAMILY
        _FAMILIES[name] = family
    return family
