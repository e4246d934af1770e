"""Configs saved with a checkpoint: written with the schema version, read from earlier versions.

A saved config is a JSON object of fields and sections, and "schema_version" (1 if it is missing).
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from esolm_jax.config import removed, schema
from esolm_jax.config.field import Field, as_text
from esolm_jax.config.renames import announce, contradiction, values_now
from esolm_jax.errors import UserError, brief, nearest

VERSION_KEY = "schema_version"
_OTHER_CODE = "use the version of esolm_jax that wrote it"


def to_saved(config: ConfigDict) -> dict:
    """A config as a JSON-able dict with the version of the schema."""
    return {VERSION_KEY: schema.VERSION, **config.to_dict()}


def from_saved(saved: Mapping, source: str = "the saved config") -> ConfigDict:
    """A saved config with today's names and fields, locked. Values are not validated.

    Args:
      source: for messages, the workdir or the file.

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
    values, renamed = _with_current_names(_flat_saved(saved), source)
    values, replaced = _with_current_values(values, source)
    values |= _values_before(
        {name: field for name, field in schema.fields().items() if name not in values},
        values,
        source,
    )
    if notes := renamed + replaced:
        announce(f"saved with earlier names: {', '.join(notes)}", f"{source}: ")
    return schema.config_of(values)


def _values_before(missing: Mapping[str, Field], values: Mapping, source: str) -> dict:
    """Values of the fields that a saved config lacks."""
    for name, field in missing.items():
        if field.before is None:
            raise UserError(
                f"{source}: config.{name}: missing, so it is not a config of esolm_jax; "
                f"{_OTHER_CODE}"
            )
    before = {name: field.before for name, field in missing.items() if not callable(field.before)}
    known = {**values, **before}
    for name, field in missing.items():
        if callable(field.before):
            try:
                before[name] = field.before(known)
            except (TypeError, ValueError) as error:  # values are not validated
                raise UserError(
                    f"{source}: config.{name}: missing, and it cannot be derived from the other "
                    f"fields ({brief(error)}); {_OTHER_CODE}"
                ) from error
    return before


def _flat_saved(saved: Mapping) -> dict:
    """Values by dotted name, without the version."""
    values = {}
    for name, value in saved.items():
        if isinstance(value, Mapping):
            values |= {f"{name}.{key}": inner for key, inner in value.items()}
        elif name != VERSION_KEY:
            values[name] = value
    return values


def _with_current_names(values: dict, source: str) -> tuple[dict, list[str]]:
    """Values under current names, and the renamed ones."""
    known, earlier, current, told = schema.fields(), schema.renamed(), {}, []
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
                f"{source}: config.{new}: must be given once, but is also given under an earlier "
                "name; remove one"
            )
        if new != name:
            told.append(f"config.{name} is config.{new} now")
        current[new] = value
    return current, told


def _with_current_values(values: dict, source: str) -> tuple[dict, list[str]]:
    """Values with former ones replaced, and the replaced ones."""
    fields, current, told = schema.fields(), dict(values), []
    for name, value in values.items():
        if now := values_now(fields[name].former_values, value):
            for other, new in now.items():
                if other != name and other in values and values[other] != new:
                    error = contradiction(name, value, now, other, values[other])
                    raise UserError(f"{source}: {error}")
            current |= now
            told.append(f"{as_text({name: value})} is {as_text(now)} now")
    return current, told
