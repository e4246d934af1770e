"""Registry: the entries of one kind by name, to which other code can add its own."""

from typing import Any, TypeVar

T = TypeVar("T")


class Registry(dict[str, T]):
    """Families, schedules, data sources or metrics by name, in order of registration."""

    def __init__(self, kind: str, entries: dict[str, T], names: list[str] | None = None):
        """`kind`: for messages. `names`: a list of the names in a lower layer, kept in step."""
        super().__init__(entries)
        self._kind = kind
        self._names = list(entries) if names is None else names

    def register(self, entry: Any, name: str = "") -> Any:
        """Adds and returns an entry, under its attribute `name` by default.

        Raises:
          ValueError: the name is taken.
        """
        name = name or entry.name
        if name in self:
            raise ValueError(f"{self._kind} {name!r}: must have a new name; this one is registered")
        self[name] = entry
        self._names.append(name)
        return entry

    def unregister(self, name: str) -> None:
        """Removes an entry, such as one of a test."""
        del self[name]
        self._names.remove(name)
