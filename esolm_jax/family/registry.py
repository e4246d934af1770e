"""The families by name. A new family is one file and one name here (or one call of `register`).

Imports no JAX: the file of a family is imported when the family is first used.
"""

import importlib
from typing import TYPE_CHECKING

from esolm_jax.errors import UserError, nearest
from esolm_jax.registry import Registry

if TYPE_CHECKING:
    from esolm_jax.family.family import Family

_FAMILIES: Registry["Family | None"] = Registry(
    "family", dict.fromkeys(("ar", "mdlm", "bd3", "eso_a", "eso_b", "mdlm_shifted"))
)
register, unregister = _FAMILIES.register, _FAMILIES.unregister
NAMES = _FAMILIES.keys()  # the allowed values of config.objective, registered ones included


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
