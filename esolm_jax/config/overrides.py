"""A config with some fields set to other values."""

import copy
import functools
from collections.abc import Mapping

from ml_collections import ConfigDict

from esolm_jax.config.schema import flat
from esolm_jax.config.validation import validate
from esolm_jax.errors import UserError, nearest

Setting = str | int | float | bool


def overridden(config: ConfigDict, fields: Mapping[str, Setting]) -> ConfigDict:
    """A copy of the config with these dotted fields set, validated and locked.

    Raises:
      UserError: a field is unknown, or a value is not allowed.
    """
    new = copy.deepcopy(config)
    for name, value in fields.items():
        *sections, field = name.split(".")
        section = functools.reduce(lambda node, key: node.get(key, {}), sections, new)
        if not isinstance(section, ConfigDict):
            known = flat(config)
            raise UserError(f"config.{name}: unknown field{nearest(name, known)}")
        with section.ignore_type():
            section[field] = value
    validate(new)
    return new
