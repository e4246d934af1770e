"""Configs saved with a checkpoint: written with the version of the schema, read of any earlier one.

A saved config is a JSON object of fields and sections, and "schema_version" (1 if it is missing).
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from esolm_jax.config import removed, schema
from esolm_jax.config.renames import (
    announce,
    announce_renamed,
    earlier_names,
    override_name,
    with_override_name,
)
from esolm_jax.errors import UserError, nearest

VERSION_KEY = "schema_version"
_OTHER_CODE = "use the version of esolm_jax that wrote it"


def to_saved(config: ConfigDict) -> dict:
    """A config as a JSON-able dict with the version of the schema."""
    return {VERSION_KEY: schema.VERSION, **config.to_dict()}


def from_saved(saved: Mapping, source: str = "the saved config") -> ConfigDict:
    """The config of a saved one, with today's names and fields, locked. Values are not validated.

    Args:
      source: for messages, where it was saved.

    Raises:
      UserError: a later version, an unknown or removed field, or a field is missing.
    """
    version = saved.get(VERSION_KEY, 1)
    if type(version) is not int or version < 1:
        raise UserError(f"{source}: {VERSION_KEY}={version!r}: must be an integer of at least 1")
    if version > schema.VERSION:
        raise UserError(
            f"{source}: its config has {VERSION_KEY} {version}, but this esolm_jax reads up to "
            f"{schema.VERSION}; install the esolm_jax that wrote it, or a later one"
        )
    values, told = _with_current_names(_flat_saved(saved), source)
    config = schema.default_config()
    with config.ignore_type():
        for name, field in schema.fields().items():
            if name not in values and field.before is None:
                raise UserError(
                    f"{source}: config.{name}: missing, so it is not a config of esolm_jax; "
                    f"{_OTHER_CODE}"
                )
            _set(config, name, values.get(name, field.before))
    if told:
        announce(f"saved with earlier names of fields: {', '.join(told)}", f"{source}: ")
    return config


def _set(config: ConfigDict, name: str, value) -> None:
    section, _, key = name.rpartition(".")
    (config[section] if section else config)[key] = value


def _flat_saved(saved: Mapping) -> dict:
    """Values by dotted name, without the version."""
    values = {}
    for name, value in saved.items():
        if isinstance(value, Mapping):
            values |= {f"{name}.{key}": inner for key, inner in value.items()}
        elif name != VERSION_KEY:
            values[name] = value
    return values


def renamed() -> dict[str, str]:
    """Earlier dotted name → name, of all fields."""
    return {
        f"{section}.{old}" if section else old: f"{section}.{new}" if section else new
        for section, table in schema.SECTIONS.items()
        for old, new in earlier_names(table).items()
    }


def _with_current_names(values: dict, source: str) -> tuple[dict, list[str]]:
    """Values under today's names, and what was renamed."""
    known, earlier, current, told = schema.fields(), renamed(), {}, []
    for name, value in values.items():
        if name in removed.REMOVED and name not in known:
            if value != removed.REMOVED[name].value:
                removed.refuse(name, f"{source}: ")
            continue
        new = name if name in known else earlier.get(name, name)
        if new not in known or isinstance(value, Mapping):
            raise UserError(
                f"{source}: config.{new[:100]}: unknown field{nearest(new[:100], known)}; "
                f"{_OTHER_CODE}"
            )
        if new in current:
            raise UserError(
                f"{source}: config.{new}: is there twice, also under an earlier name; remove one"
            )
        if new != name:
            told.append(f"config.{name} is config.{new} now")
        current[new] = value
    return current, told


def with_current_names(argv: list[str]) -> list[str]:
    """Arguments of a command line in which overrides have today's names.

    Raises:
      UserError: an override of a removed or unknown field.
    """
    known, earlier = schema.fields(), renamed()
    args = []
    for arg in argv:
        name = override_name(arg)
        if name is not None and name not in known:
            removed.refuse(name)
            if name not in earlier:
                raise UserError(f"config.{name}: unknown field{nearest(name, known)}")
            announce_renamed(name, earlier[name])
            arg = with_override_name(arg, earlier[name])
        args.append(arg)
    return args
