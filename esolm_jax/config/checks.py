"""Checks of one value, and their description in messages."""

import dataclasses
from collections.abc import Callable, Collection

import numpy as np

from esolm_jax.errors import nearest

MAX_INT = 2**31 - 1  # JAX counts in 32 bits
MAX_LENGTH = 2**24  # tokens of a text, rows of a batch, ids of a vocabulary
MAX_WIDTH = 2**20
MAX_BLOCKS = 1024  # the blocks of a sampler are traced one by one
MAX_UNROLL = 128  # each unrolled block is compiled separately
MAX_SECONDS = 10**6
MAX_DRAWS = 10**6
MAX_STEPS = 10**6  # of a sampling schedule
MAX_TEXTS = 2**20  # per batch; the host computes a schedule for each
MAX_WORKERS = 256  # each is a Python process; see WORKER_BYTES in memory_limit.py

SMALLEST, LARGEST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


@dataclasses.dataclass(frozen=True)
class Check:
    """A requirement on a value of the right type. `text` completes "must be …"."""

    accepts: Callable[[object], bool]
    text: str

    def hint(self, value) -> str:
        """An addition to the message that refuses the value."""
        del value
        return ""


@dataclasses.dataclass(frozen=True)
class OneOf:
    """A Check for names, such as a tuple, or a registry that may grow later."""

    names: Collection[str]

    def accepts(self, value) -> bool:
        return value in self.names

    @property
    def text(self) -> str:
        return "one of " + ", ".join(self.names)

    def hint(self, value) -> str:
        return nearest(value, self.names)


@dataclasses.dataclass(frozen=True)
class ListOf:
    """A Check for comma-separated names, `required` among them (""= none is)."""

    names: Collection[str]
    required: str = ""

    def accepts(self, value) -> bool:
        given = [name.strip() for name in value.split(",")]
        fine = len(set(given)) == len(given) and all(name in self.names for name in given)
        return fine and (not self.required or self.required in given)

    @property
    def text(self) -> str:
        also = f", {self.required} among them" if self.required else ""
        return "comma-separated, each once, of " + ", ".join(self.names) + also

    def hint(self, value) -> str:
        unknown = [n for n in map(str.strip, value.split(",")) if n not in self.names]
        return nearest(unknown[0], self.names) if unknown else ""


def at_least(low, high=None) -> Check:
    if high is None:
        return Check(lambda v: v >= low, f"at least {low}")
    return Check(lambda v: low <= v <= high, f"at least {low}, and at most {high:,}")


def count(low: int) -> Check:
    return at_least(low, MAX_INT)


def size(low: int) -> Check:
    return at_least(low, MAX_LENGTH)


def width(low: int) -> Check:
    return at_least(low, MAX_WIDTH)


def between(low, high) -> Check:
    return Check(lambda v: low <= v <= high, f"in [{low}, {high}]")


def inside(low, high) -> Check:
    return Check(lambda v: low < v < high, f"between {low} and {high}, both excluded")


def above(low) -> Check:
    return Check(lambda v: v > low, f"above {low}")


EPSILON = Check(lambda v: 0 < v <= 1, "above 0, and at most 1")
FRACTION = Check(lambda v: 0 <= v < 1, "in [0, 1)")


def step_range(text: str) -> range:
    """The steps of "FIRST:STOP"; STOP is excluded. ValueError if the text is something else."""
    first, stop = (int(part) if part.isdecimal() else 0 for part in text.split(":"))
    if not 1 <= first < stop <= MAX_INT:
        raise ValueError(text)
    return range(first, stop)


def _is_step_range(text: str) -> bool:
    try:
        return not text or bool(step_range(text))
    except ValueError:
        return False


STEP_RANGE = Check(
    _is_step_range,
    "'' or FIRST:STOP with 1 <= FIRST < STOP, such as 100:105 (steps 100 to 104)",
)
SEED = Check(lambda v: 0 <= v < 2**32, "in [0, 2**32)")


def as_32_bits(value):
    """A number in 32 bits (floats rounded to float32); None if it is not finite, overflows or
    underflows."""
    if not isinstance(value, int | float):
        return value
    if value and not SMALLEST <= abs(value) <= LARGEST:  # NaN compares as False
        return None
    return float(np.float32(value)) if isinstance(value, float) else value


def problem(check: Check | OneOf | ListOf, value) -> str:
    """The requirement if the value breaks it, else "". A float must be allowed as given and as
    float32: 0.999999999 is 1 in 32 bits."""
    number = as_32_bits(value)
    if number is None:
        return (
            f"{check.text}, and finite in 32 bits (0, or of a size from {SMALLEST:.2g} to "
            f"{LARGEST:.2g})"
        )
    if not check.accepts(value):
        return check.text + check.hint(value)
    if not check.accepts(number):
        return f"{check.text}, also when rounded to 32 bits ({number:g})"
    return ""
