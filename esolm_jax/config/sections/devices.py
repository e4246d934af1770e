"""Fields of config.mesh and config.distributed."""

import functools

from esolm_jax.config.checks import MAX_SECONDS, MAX_WIDTH, Check, at_least, width
from esolm_jax.config.field import Field

_field = functools.partial(Field, may_change_on_resume=True)
_AXIS = Check(
    lambda v: v == -1 or 1 <= v <= MAX_WIDTH,
    f"-1 (the rest of the devices) or at least 1, and at most {MAX_WIDTH:,}",
)
_SECONDS = at_least(1, MAX_SECONDS)

MESH = {  # axes multiply to the devices; one may be -1
    "data": _field(-1, "Splits rows; over the slow network if there is one.", _AXIS),
    "fsdp": _field(1, "Splits rows, parameters and optimizer state.", _AXIS),
    "tensor": _field(1, "Splits heads, MLP and vocabulary.", _AXIS),
    "sequence": _field(1, "Splits the tokens of a row.", _AXIS),
    "devices": _field(0, "Number of devices to use; 0 = all.", width(0)),
}

DISTRIBUTED = {
    "init_timeout": _field(300, "Seconds for all processes to meet at the start.", _SECONDS),
    "heartbeat_timeout": _field(100, "Seconds until a silent process counts as dead.", _SECONDS),
    "barrier_timeout": _field(300, "Seconds for all processes to reach a barrier.", _SECONDS),
}  # fmt: skip
