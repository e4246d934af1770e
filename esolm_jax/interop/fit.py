"""Compares named tensors with those of a model and reports every difference in one error."""

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

from esolm_jax.errors import UserError

_SHOWN = 8  # names of each kind
_COMPARED, _LONGEST = 30, 80  # candidates for the nearest name, and their maximum length


def check(
    tensors: Mapping[str, Any],
    wanted: Mapping[str, tuple[int, ...]],
    where: str,
    ignored: Collection[str] = (),
) -> None:
    """UserError, one line that lists missing and unexpected tensors (with the nearest names) and
    wrong shapes, unless the tensors are those of the model. `ignored` tensors are optional."""
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted and name not in ignored]
    shapes = [
        f"{ascii(name)[1:-1]}: shape {tuple(tensors[name].shape)} here, {shape} in the model"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    problems = []
    if missing:
        problems.append(f"missing tensors: {_listed(missing, extra, 'here is')}")
    if extra:
        listed = _listed(extra, missing, "the model has")
        problems.append(f"tensors that belong to no part of this model: {listed}")
    if shapes:
        problems.append(_cut(shapes, "; "))
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")


def _listed(names: list[str], others: list[str], relation: str) -> str:
    """Names, each with the nearest of the others; a name in every block is listed once."""
    groups, near = _by_pattern(names), _by_pattern(others)
    candidates = [members[0] for members in list(near.values())[:_COMPARED]]
    shown = []
    for pattern, members in list(groups.items())[:_SHOWN]:  # all comparisons could take too long
        name = members[0]
        close = difflib.get_close_matches(name, candidates, n=1)
        count = f" (in {len(members)} blocks)" if len(members) > 1 else ""
        label = pattern if count else name
        nearest = f" ({relation} {ascii(close[0])[1:-1]})" if close else ""
        shown.append(ascii(label)[1:-1] + count + nearest)
    return _cut(shown, ", ", len(groups))


def _by_pattern(names: list[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        name = name[:_LONGEST]
        groups.setdefault(re.sub(r"\b(blocks|layers|h)\.\d+\.", r"\1.*.", name), []).append(name)
    return groups


def _cut(texts: list[str], separator: str, count: int = 0) -> str:
    count = count or len(texts)
    more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
    return separator.join(texts[:_SHOWN]) + more
