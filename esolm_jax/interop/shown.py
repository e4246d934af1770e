"""Values of a foreign file in messages: scalars, cut short; of anything else only what it is.

The repr of nested tuples that share their parts is exponential in the size of the file.
"""

from typing import Any

from esolm_jax.interop.torch_pickle import Name, Object

_BITS = 256  # of an integer that is written out


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
