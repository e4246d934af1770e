"""Earlier names and values of fields: Section, which accepts them in config files, and notices."""

import sys
import types
from collections.abc import Mapping

from ml_collections import ConfigDict

from esolm_jax.config import removed
from esolm_jax.config.field import Field, Value, as_text
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


def values_now(former_values: Mapping[str, Mapping[str, Value]], value) -> Mapping[str, Value]:
    """The values that replace a former value, by dotted name; {} if it is not a former one."""
    return former_values.get(value, {}) if isinstance(value, str) else {}


def announce_former_value(name: str, value: str, now: Mapping[str, Value]) -> None:
    """Advises to set today's values instead of a former one."""
    announce(f"{as_text({name: value})}: is {as_text(now)} now; use the new value")


def contradiction(name: str, value: str, now: Mapping[str, Value], other: str, have) -> UserError:
    """The error for a former value that conflicts with the explicit value `have` of `other`."""
    return UserError(
        f"{as_text({name: value})}: is {as_text(now)} now, but "
        f"{as_text({other: have})} is also set; remove one of them"
    )


def earlier_names(table: Mapping[str, Field]) -> dict[str, str]:
    """Earlier name → name, of a table of fields."""
    return {old: name for name, field in table.items() for old in field.formerly}


class Section(ConfigDict):
    """A ConfigDict in which a field can also be read and written under its earlier names, and set
    to its former values."""

    _STATE = ("_prefix", "_earlier", "_former_values", "_set_explicitly", "_implied")
    _prefix = ""
    _earlier: Mapping[str, str] = types.MappingProxyType({})
    _former_values: Mapping[str, Mapping] = types.MappingProxyType({})  # by field, as in Field
    _set_explicitly: frozenset[str] = frozenset()
    # A field that a former value of another field has set → that field, and the value until then.
    _implied: Mapping[str, tuple[str, Value]] = types.MappingProxyType({})

    @classmethod
    def of(cls, name: str, table: Mapping[str, Field]) -> "Section":
        """An empty section of this name ("" = the whole config) for the fields of the table."""
        section = cls()
        section._update(
            _prefix=f"{name}." if name else "",
            _earlier=earlier_names(table),
            _former_values={n: f.former_values for n, f in table.items() if f.former_values},
        )
        return section

    def _update(self, **state) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)

    def _take_state(self, state: Mapping) -> None:
        self._update(**{name: state[name] for name in self._STATE if name in state})

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
        if key in self._fields:  # not while the section is built
            self._retract(key)
            self._update(_set_explicitly=self._set_explicitly | {key})
            if now := values_now(self._former_values.get(key, {}), value):
                value = self._imply(key, value, now)
        super().__setitem__(key, value)

    def _imply(self, key: str, value: str, now: Mapping[str, Value]) -> Value:
        """Sets the other fields that a former value of `key` stands for; today's value of `key`."""
        name = self._prefix + key
        others = {full.removeprefix(self._prefix): v for full, v in now.items() if full != name}
        for other, new in others.items():
            if other in self._set_explicitly and self[other] != new:
                raise contradiction(name, value, now, self._prefix + other, self[other])
        announce_former_value(name, value, now)
        before = {other: (key, self[other]) for other in others}
        for other, new in others.items():
            super().__setitem__(other, new)
        self._update(_implied={**self._implied, **before})
        return now[name]

    def _retract(self, key: str) -> None:
        """Undoes what a former value of `key` has set; `key` itself is set by its user from now."""
        for other, (cause, value) in self._implied.items():
            if cause == key:
                super().__setitem__(other, value)
        kept = {k: v for k, v in self._implied.items() if k != key and v[0] != key}
        self._update(_implied=kept)

    def copy_and_resolve_references(self, visit_map=None):
        copy = super().copy_and_resolve_references(visit_map)
        copy._take_state(self.__dict__)
        return copy

    def __setstate__(self, state):
        super().__setstate__(state)
        self._take_state(state)
