"""Overrides on the command line, --config.SECTION.FIELD=VALUE, with earlier names and values."""

import re
from collections.abc import Mapping

from esolm_jax.config import removed, schema
from esolm_jax.config.renames import (
    announce_former_value,
    announce_renamed,
    contradiction,
    values_now,
)
from esolm_jax.errors import UserError, nearest

_OVERRIDE = re.compile(r"(--?)(no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)


def with_current_overrides(argv: list[str]) -> list[str]:
    """Arguments of a command line in which overrides have today's names and values.

    Raises:
      UserError: an override of a removed or unknown field, or two that contradict each other.
    """
    args = [_with_current_name(arg) for arg in argv]
    fields, last, replaced = schema.fields(), _last_values(args), {}
    for name, (position, value) in last.items():
        if now := values_now(fields[name].former_values, value):
            _check_agreement(name, value, now, last)
            announce_former_value(name, value, now)
            replaced[position] = [f"--config.{other}={new}" for other, new in now.items()]
            if "=" not in args[position]:
                replaced[position + 1] = []  # the value is a separate argument
    return [word for i, arg in enumerate(args) for word in replaced.get(i, [arg])]


def _with_current_name(arg: str) -> str:
    match = _OVERRIDE.fullmatch(arg)
    known, earlier = schema.fields(), schema.renamed()
    if match is None or match[3] in known:
        return arg
    dashes, no, name, value = match.groups()
    removed.refuse(name)
    if name not in earlier:
        raise UserError(f"config.{name}: unknown field{nearest(name, known)}")
    announce_renamed(name, earlier[name])
    return f"{dashes}{no or ''}config.{earlier[name]}" + ("" if value is None else f"={value}")


def _last_values(args: list[str]) -> dict[str, tuple[int, str]]:
    """Name of each overridden field → the position of its last override, and the value."""
    last = {}
    for i, (arg, following) in enumerate(zip(args, [*args[1:], ""], strict=True)):
        if match := _OVERRIDE.fullmatch(arg):
            _, no, name, value = match.groups()
            if value is None:
                is_bool = isinstance(schema.fields()[name].default, bool)
                value = str(not no) if is_bool else following
            last[name] = i, value
    return last


def _check_agreement(name: str, value: str, now: Mapping, last: Mapping) -> None:
    """UserError if a former value stands for a value of another field that is overridden, too."""
    for other, new in now.items():
        if other != name and other in last and last[other][1] != str(new):
            raise contradiction(name, value, now, other, last[other][1])
