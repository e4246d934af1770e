"""Compiled programs that are found without being traced.

JAX's cache knows a program by its text, and to make the text of a decoding loop takes most of a
second. Here the key is all that the text follows from: the code of this package, the versions and
settings of JAX, the devices, and the structure, shapes and shardings of the arguments. The entry of
a key names the program's entry in JAX's cache, and has its calling convention: a pickle, so it is
read from the user's own folder alone (process/compilation_cache.py).
"""

import hashlib
import io
import os
from collections.abc import Callable
from typing import Any

import flax
import jax
from jax.experimental import serialize_executable as serialization

from esolm_jax.parallel import multihost
from esolm_jax.process import compilation_cache


def compile_or_load(
    name: str,
    lower: Callable[..., jax.stages.Lowered],
    args: tuple,
    options: dict | None = None,
) -> jax.stages.Compiled:
    """lower(*args).compile(options), known by the arguments if the user's folder is in use.

    Args:
      name: names a function of this package; its program follows from the name and the structure
        of `args`, static fields included.
      lower: the function's.
      args: pytrees of arrays or ShapeDtypeStructs.
    """
    programs = compilation_cache.in_use()
    if jax.process_count() > 1 or not jax.config.jax_enable_compilation_cache:
        programs = None
    key = _key(name, args, options) if programs else None
    if programs is None or key is None:
        return lower(*args).compile(options)
    if (entry := programs.get(key)) is not None:
        try:
            return _load(programs, entry, _devices(args))
        except Exception:  # damaged or evicted in part: of many types
            pass
    programs.last_key = None
    compiled = lower(*args).compile(options)
    if programs.last_key is not None:
        try:
            entry = _dump(compiled, programs.last_key)
        except Exception:  # not every program can be stored
            return compiled
        programs.put(key, entry)
    return compiled


class _Pickler(serialization._JaxPjrtPickler):
    """In place of the executable, the key of its entry in JAX's cache."""

    def __init__(self, file: io.BytesIO, key: str):
        super().__init__(file)
        self._key = key

    def persistent_id(self, obj):
        if hasattr(obj, "serialize") and hasattr(obj, "get_compiled_memory_stats"):
            return "exec", self._key
        return super().persistent_id(obj)


class _Unpickler(serialization._JaxPjrtUnpickler):
    def __init__(self, file: io.BytesIO, devices: list[jax.Device], programs):
        super().__init__(file, devices[0].client, devices)
        self._programs = programs

    def persistent_load(self, pid):
        if pid[0] == "exec":
            pid = "exec", compilation_cache.executable_of(self._programs.get(pid[1]))
        return super().persistent_load(pid)


def _dump(compiled: jax.stages.Compiled, key: str) -> bytes:
    """As serialization.serialize, which includes the executable."""
    if compiled._params.const_args:
        raise ValueError("a program with constant arguments")
    args_info, in_tree = jax.tree.flatten(compiled.args_info)
    unloaded = compiled._executable._unloaded_executable
    with io.BytesIO() as file:
        what = unloaded, args_info, compiled._no_kwargs, in_tree, compiled.out_tree
        _Pickler(file, key).dump(what)
        return file.getvalue()


def _load(programs, entry: bytes, devices: list[jax.Device]) -> jax.stages.Compiled:
    with io.BytesIO(entry) as file:
        unloaded, args_info, no_kwargs, in_tree, out_tree = _Unpickler(
            file, devices, programs
        ).load()
    args_info = in_tree.unflatten(args_info)
    return jax.stages.Compiled(unloaded.load(), [], args_info, out_tree, no_kwargs=no_kwargs)


def _devices(args: tuple) -> list[jax.Device]:
    """The devices of the arguments, in the order of their mesh."""
    for leaf in jax.tree.leaves(args):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding):
            return list(sharding.mesh.devices.flat)
    return jax.devices()[:1]


def _key(name: str, args: tuple, options: dict | None) -> str | None:
    """Of a program; None if its arguments have no text that identifies them."""
    leaves, tree = jax.tree.flatten(args)
    devices = _devices(args)
    text = "\n".join(
        [
            f"{name} {options}",
            f"{multihost.code_hash()} {jax.__version__} {flax.__version__}",
            f"{devices} {devices[0].device_kind} {devices[0].client.platform_version}",
            *(f"{flags}={os.environ.get(flags)}" for flags in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")),
            repr(sorted(jax.config.values.items(), key=lambda pair: pair[0])),
            str(tree),
            *map(_described, leaves),
        ]
    )
    if " at 0x" in text:
        return None
    return f"call-{hashlib.sha256(text.encode()).hexdigest()}"


def _described(leaf: Any) -> str:
    aval = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    where = getattr(leaf, "sharding", None)
    return f"{aval.dtype} {aval.shape} {aval.weak_type} {where}"
