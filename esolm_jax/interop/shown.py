"""Formats values of foreign files for messages: scalars are shortened, others show their type.

The repr of nested tuples with shared parts is exponential in the size of the file.
"""

from typing import Any

from esolm_jax.interop.torch_file.objects import Name, Object

_BITS = 256  # longer integers are not printed


def shown(value: Any, width: int = 80) -> str:
    """At most about `width` printable ASCII characters."""
    if isinstance(value, Object | Name):
        return str(value.kind if isinstance(value, Object) else value)
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > _BITS:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        return ascii(value[:width])[:width]
    if value is None or isinstance(value, int | float):
        return repr(value)
    return f"a {type(value).__name__}"


def is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)
