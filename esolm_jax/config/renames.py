"""Earlier names of fields: accepted in config files, on the command line and in saved configs."""

import re
import sys
import types
from collections.abc import Mapping

from ml_collections import ConfigDict

from esolm_jax.config import removed
from esolm_jax.config.field import Field
from esolm_jax.errors import UserError, nearest

_announced: set[str] = set()


def announce(line: str, source: str = "") -> None:
    """Prints a line on stderr, once per command, even if several sources lead to it."""
    if line not in _announced:
        _announced.add(line)
        print(source + line, file=sys.stderr)


def begin_command() -> None:
    """Clears the state of an earlier command in this process."""
    _announced.clear()


def announce_renamed(old: str, new: str) -> None:
    """Advises to use the new dotted name."""
    announce(f"config.{old}: is called config.{new} now; use the new name")


def earlier_names(table: Mapping[str, Field]) -> dict[str, str]:
    """Earlier name → name, of a table of fields."""
    return {old: name for name, field in table.items() for old in field.formerly}


class Section(ConfigDict):
    """A ConfigDict in which a field can also be read and written under its earlier names."""

    _prefix = ""
    _earlier: Mapping[str, str] = types.MappingProxyType({})

    @classmethod
    def of(cls, name: str, table: Mapping[str, Field]) -> "Section":
        """An empty section of this name ("" = the whole config) for the fields of the table."""
        prefix = f"{name}." if name else ""
        return _set_names({"_prefix": prefix, "_earlier": earlier_names(table)}, cls())

    def _current(self, key):
        if key in self._fields or self._earlier.get(key) not in self._fields:
            return key
        new = self._earlier[key]
        announce_renamed(self._prefix + key, self._prefix + new)
        return new

    def __getitem__(self, key):
        return super().__getitem__(self._current(key))

    def __setitem__(self, key, value):
        key = self._current(key)
        if self.is_locked and key not in self._fields:
            removed.refuse(f"{self._prefix}{key}")
            raise UserError(
                f"config.{self._prefix}{key}: unknown field{nearest(str(key), self._fields)}"
            )
        super().__setitem__(key, value)

    def copy_and_resolve_references(self, visit_map=None):
        copy = super().copy_and_resolve_references(visit_map)
        return _set_names(self.__dict__, copy)

    def __setstate__(self, state):
        super().__setstate__(state)
        _set_names(state, self)


def _set_names(state: Mapping, section: Section) -> Section:
    for name in ("_prefix", "_earlier"):
        if name in state:
            object.__setattr__(section, name, state[name])
    return section


_OVERRIDE = re.compile(r"(--?)(no)?config\.([^=]+)(.*)", re.DOTALL)


def override_name(arg: str) -> str | None:
    """The dotted name in --config.NAME=VALUE or --noconfig.NAME; None for another argument."""
    match = _OVERRIDE.fullmatch(arg)
    return match[3] if match else None


def with_override_name(arg: str, name: str) -> str:
    """The same argument for another field."""
    dashes, no, _, value = _OVERRIDE.fullmatch(arg).groups(default="")
    return f"{dashes}{no}config.{name}{value}"
