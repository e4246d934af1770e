"""The objects in a pickle of `torch.save`: tensors, plain containers, and inert `Object`s."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Name:
    """A name that the file gives; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return ascii(f"{self.module[:100]}.{self.name[:100]}"[:100])[1:-1]


class Object:
    """An object that is not built: its class, arguments and state in the file."""

    __slots__ = ("args", "entries", "items", "kind", "state")

    def __init__(self, kind: Name, args: tuple = ()):
        self.kind, self.args = kind, args
        self.state: Any = None
        self.items: list | None = None  # if it is a list or a set
        self.entries: dict | None = None  # if it is a dict


Rebuild = Callable[..., Any]
_KEY = Name("a dict", "key")
MOST_ARGS = 32  # limit for a call that builds a tensor
_MOST_KEY_BITS = 60  # hashes of larger integers can be made to collide
_DEFAULT_DICT = ("collections", "defaultdict")
_DICTS = {("collections", "OrderedDict"), _DEFAULT_DICT}
_SETS = {(m, kind) for m in ("__builtin__", "builtins") for kind in ("set", "frozenset")}
_SIZE = ("torch", "Size")
_COPIED_ITEM = 80  # bytes


class Builder:
    """Builds the results of calls, within a budget."""

    def __init__(self, rebuild: dict[tuple[str, str], Rebuild], charge: Callable[[int], None]):
        """`rebuild`: functions that build a tensor, by module and name; `charge`: Budget.charge."""
        self._rebuild, self._charge = rebuild, charge

    def call(self, kind: Name, args: tuple):
        """A tensor, a plain container, or an Object for any other call."""
        name = kind.module, kind.name
        if name in self._rebuild:
            if len(args) > MOST_ARGS:
                raise ValueError(f"a tensor of {len(args)} arguments")
            return self._rebuild[name](*args)
        items = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else None
        if (name in _DICTS and not args) or name == _DEFAULT_DICT:
            return {}
        if items is not None and name in _SETS | {_SIZE} | _DICTS:
            self._charge(_COPIED_ITEM * len(items))
            if name in _SETS:
                return self.make_set(items)
            if name == _SIZE:
                return tuple(items)
            return self.make_dict(items)
        return set() if name in _SETS and not args else Object(kind, args)

    def _key(self, value):
        """A key that is cheap to hash and to compare; other keys (never used) become an Object."""
        if isinstance(value, str | bytes):
            self._charge(len(value))
            return value
        if isinstance(value, int) and value.bit_length() > _MOST_KEY_BITS:
            return Object(_KEY)
        return value if isinstance(value, int | float | Object | None) else Object(_KEY)

    def make_set(self, items) -> set:
        return {self._key(item) for item in items}

    def make_dict(self, pairs) -> dict:
        return {self._key(key): value for key, value in pairs}
