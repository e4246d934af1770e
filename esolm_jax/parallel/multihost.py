"""Barriers, and values that the processes of a run agree on.

In a run of one process each function returns immediately. Otherwise all processes make the same
calls.
"""

import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from esolm_jax.errors import UserError
from esolm_jax.parallel import distributed
from esolm_jax.process import failures

_calls = itertools.count()  # of gather() and others: all processes make the same ones


def barrier(name: str, *, timeout: float) -> None:
    """Returns when all processes have reached this call.

    Raises:
      UserError: not all of them reached it within `timeout` seconds.
    """
    if not distributed.is_started():
        return
    try:
        distributed.client().wait_at_barrier(name, int(1000 * timeout))
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"process {distributed.process_index()}: not all {distributed.process_count()} "
            f"processes reached {name!r} within {timeout} s (config.distributed.barrier_timeout)"
        ) from error


def gather(value: str, *, timeout: float | None = None) -> list[str]:
    """The values of all processes, in order of process; all must make the same calls.

    Args:
      timeout: seconds to wait for the others; by default the barrier_timeout of start().

    Raises:
      UserError: as barrier().
    """
    if not distributed.is_started():
        return [value]
    place = f"esolm_jax/same/{next(_calls)}"
    distributed.client().key_value_set(f"{place}/{distributed.process_index():08}", value)
    barrier(place, timeout=distributed.default_timeout() if timeout is None else timeout)
    return [said for _, said in sorted(distributed.client().key_value_dir_get(place))]


def from_main(value: str) -> str:
    """Process 0's value, in all processes."""
    return gather(value)[0]


def check_same(what: Mapping[str, str], *, timeout: float) -> None:
    """Compares e.g. {"config": hash} between all processes.

    Raises:
      UserError: they differ, with the same message in every process; or as barrier().
    """
    if not distributed.is_started():
        return
    said = [json.loads(value) for value in gather(json.dumps(dict(what)), timeout=timeout)]
    differences = []
    for name in dict.fromkeys(name for one in said for name in one):
        holders: dict[str, list[int]] = {}
        for index, one in enumerate(said):
            holders.setdefault(one.get(name, "none"), []).append(index)
        if len(holders) > 1:
            held = ", ".join(f"{value} on {_processes(on)}" for value, on in holders.items())
            differences.append(f"{name} differs between hosts: {held}")
    if differences:
        raise UserError("; ".join(differences))


def check_same_value(name: str, value: Any) -> None:
    """Compares a value that its repr identifies between all processes, which run the same programs
    on it. UserError: as check_same()."""
    if distributed.is_started():
        digest = hashlib.sha256(repr(value).encode()).hexdigest()[:12]
        check_same({name: digest}, timeout=distributed.default_timeout())


def on_main(action: Callable[[], Any]) -> Any:
    """Process 0 runs action() and returns its result; the others wait, and return None.

    They wait without a time limit while process 0 is alive.

    Raises:
      UserError: action() raised UserError or OSError; the message is the same in every process.
    """
    if not distributed.is_started():
        return action()
    client, key = distributed.client(), f"esolm_jax/on_main/{next(_calls)}"
    if distributed.is_main():
        try:
            result = action()
        except (UserError, OSError) as error:
            client.key_value_set(key, json.dumps(failures.describe(error).line))
            raise
        client.key_value_set(key, json.dumps(None))
        return result
    while True:
        try:
            said = json.loads(client.blocking_key_value_get(key, 60_000))
            break
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
    if said is not None:
        raise UserError(said)
    return None


def together(jitted: Callable) -> Callable:
    """A jitted function whose first run on new shapes begins simultaneously in all processes.

    The first collective of a program connects the processes that take part, and Gloo gives them
    30 s. So each process compiles the program first, then waits for the others. In a single process
    this returns `jitted` itself. In many processes, all must make the same calls.
    """
    if not distributed.is_started():
        return jitted
    compiled: dict[tuple, Callable] = {}

    def call(*args):
        leaves, tree = jax.tree.flatten(args)
        key = tree, *((getattr(a, "shape", ()), getattr(a, "dtype", type(a))) for a in leaves)
        if key not in compiled:
            program = jitted.lower(*args).compile()
            name = getattr(jitted, "__name__", "a program")
            barrier(f"first run of {name} ({next(_calls)})", timeout=distributed.default_timeout())
            compiled[key] = program
        return compiled[key](*args)

    return call


def to_host(tree: Any) -> Any:
    """The arrays of a tree in NumPy, whole, in all processes; all must make the same calls."""

    def one(array: Any) -> Any:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            array = array if array.is_fully_replicated else _replicate(array.sharding)(array)
        return jax.device_get(array)

    return jax.tree.map(one, tree)


@functools.lru_cache(maxsize=64)
def _replicate(where: NamedSharding) -> Callable:
    replicated = NamedSharding(where.mesh, PartitionSpec())
    return together(jax.jit(lambda array: array, out_shardings=replicated))


def _processes(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:8])) + (", …" if len(indices) > 8 else "")
    return f"process{'es' if len(indices) > 1 else ''} {shown}"


def config_hash(config) -> str:
    """Twelve hex digits that follow from all fields of a ConfigDict."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code_hash() -> str:
    """Twelve hex digits that follow from the source files of this package."""
    root = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(source)}\n".encode() + source)
    return digest.hexdigest()[:12]
