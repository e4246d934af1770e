"""RoPE of config.json ↔ the fields of config.model: linear, llama3 and yarn, in the fields of old
and of new versions of `transformers`.

Refused: scaling that depends on the length of each text (dynamic, longrope), and partial rotation.
"""

import math
from typing import Any

from esolm_jax.errors import UserError
from esolm_jax.interop.shown import shown

_KINDS = ("default", "linear", "llama3", "yarn")
# ours → the field of llama3 and of yarn, and its default (None = required).
_BOUNDS = {
    "llama3": {"rope_low": ("low_freq_factor", None), "rope_high": ("high_freq_factor", None)},
    "yarn": {"rope_low": ("beta_slow", 1.0), "rope_high": ("beta_fast", 32.0)},
}
_MOST = 3e38  # numbers fit 32 bits


def fields(hub: dict[str, Any], where: str) -> dict[str, Any]:
    """Fields of config.model. UserError: an unsupported scaling, or a damaged field."""
    rope = {"rope_theta": hub["rope_theta"]} if hub.get("rope_theta") is not None else {}
    for name in ("rope_scaling", "rope_parameters"):  # the old and the new field
        rope |= _section(hub.get(name), f"{where}: {name}")
    made: dict[str, Any] = {"rope_base": _number(rope, "rope_theta", 10_000.0, where)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _KINDS or rope.get("truncate", True) is not True:
        what = shown(kind) if kind not in _KINDS else f"{shown(kind)} with truncate=False"
        raise UserError(
            f"{where}: an unsupported architecture: rope scaling {what} (allowed: "
            f"{', '.join(_KINDS)})"
        )
    if kind == "default":
        return made
    made |= {"rope_scaling": kind, "rope_factor": _number(rope, "factor", None, where)}
    if kind == "linear":
        return made
    length = _number(rope, "original_max_position_embeddings", None, where)
    if length != int(length):
        raise UserError(f"{where}: original_max_position_embeddings={length}: must be an integer")
    made["rope_original_length"] = int(length)
    for name, (theirs, default) in _BOUNDS[kind].items():
        made[name] = _number(rope, theirs, default, where)
    if not made["rope_low"] < made["rope_high"]:
        low, high = (theirs for theirs, _ in _BOUNDS[kind].values())
        raise UserError(f"{where}: {low}={made['rope_low']:g}: must be below {high}")
    if kind == "yarn":
        made["rope_attention_factor"] = _attention_factor(rope, made["rope_factor"], where)
    return made


def _attention_factor(rope: dict, factor: float, where: str) -> float:
    """Yarn's factor of rotated queries and keys: 0.1 · ln(factor) + 1, if it is not given."""

    def of(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor", None, where)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return of(_number(rope, "mscale", 1.0, where)) / of(
            _number(rope, "mscale_all_dim", 1.0, where)
        )
    return of(1.0)


def to_hub(model: Any) -> dict[str, Any]:
    """The section rope_parameters of a model (config.model)."""
    made: dict[str, Any] = {"rope_theta": model.rope_base, "rope_type": "default"}
    if model.rope_factor == 1:
        return made
    made |= {"rope_type": model.rope_scaling, "factor": model.rope_factor}
    for name, (theirs, _) in _BOUNDS.get(model.rope_scaling, {}).items():
        made[theirs] = model[name]
        made["original_max_position_embeddings"] = model.rope_original_length
    if model.rope_scaling == "yarn":
        made["attention_factor"] = model.rope_attention_factor
    return made


def _number(rope: dict, name: str, default: float | None, where: str) -> float:
    """A positive number. `default`: for a missing or null field; None: the field is required."""
    value = default if rope.get(name) is None else rope[name]
    if value is None:
        raise UserError(f"{where}: {name} is missing")
    if type(value) not in (int, float) or not 0 < value <= _MOST:
        raise UserError(f"{where}: {name}={shown(value)}: must be a positive number")
    return float(value)


def _section(section: Any, where: str) -> dict:
    """The content of rope_parameters or rope_scaling. UserError: not an object of scalars (for
    example one object per type of layer), or partial rotation of heads."""
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise UserError(f"{where}={shown(section)}: must be an object")
    for name, value in section.items():
        if isinstance(value, dict | list):
            raise UserError(
                f"{where}: an unsupported architecture: {shown(name)} is {shown(value)}"
            )
    if section.get("partial_rotary_factor") not in (None, 1):
        value = shown(section["partial_rotary_factor"])
        raise UserError(
            f"{where}: an unsupported architecture: partial_rotary_factor={value} (allowed: 1)"
        )
    return section
