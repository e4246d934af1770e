"""Compiles the StableHLO files of an export for accelerators that need not exist."""

import functools
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.export
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from esolm_jax.aot import report, topology
from esolm_jax.errors import UserError
from esolm_jax.interop.export.artefacts import Source
from esolm_jax.interop.export.shipped import decode_loop, run_stablehlo, schedule_esolm
from esolm_jax.interop.export.weight_storage import Specs

ROWS = 8  # of a call


def check(names: Sequence[str]) -> None:
    """UserError: an unknown topology, or one whose compiler is not installed."""
    for name in names:
        try:
            topology.devices(name)
        except UserError as error:
            raise UserError(str(error).replace("--topology", "--compile_for", 1)) from error


def _arguments(source: Source) -> tuple:
    """The arguments of `sample` for 8 texts, with the passes of config.sample."""
    s = schedule_esolm.checked(source.plan, {}, None)
    rows = np.full((ROWS, s["length"]), -1, np.int32)
    passes = schedule_esolm.plan_passes(s, rows >= 0, 0)
    return run_stablehlo.arguments(s, passes, rows, decode_loop.row_keys(0, ROWS))


def _inputs(arguments: tuple, length: int, entry: Mapping) -> list[tuple[tuple[int, ...], str]]:
    """(shape, dtype) of the inputs of a call for the texts of these arguments."""
    if entry["function"] == "sample":
        return [(np.shape(a), np.asarray(a).dtype.name) for a in arguments]
    window = len(arguments[-2])  # of the narrow passes
    sizes = {"b": ROWS, "t": length, "w": window, "s": length + window}
    return [
        (tuple(sizes.get(dim, dim) for dim in array["shape"]), array["dtype"])
        for array in entry["inputs"]
    ]


def compile_all(names: Sequence[str], source: Source, entries: Sequence[Mapping]) -> list[dict]:
    """Compiles each StableHLO file as it was written, for the first device of each topology.

    Args:
      entries: of the manifest.

    Returns, for each file and topology: file, topology, rows, length, and `hbm`, the bytes of
    arguments, temporaries and in total.
    """
    length, compiled = source.plan["length"], []
    arguments = _arguments(source) if names else ()
    files = [entry for entry in entries if entry["file"].endswith(".stablehlo")]
    for name in names:
        for entry in files:
            inputs = _inputs(arguments, length, entry)
            hbm = _compile(name, source.folder / entry["file"], source.stored(), inputs)
            compiled.append(
                {"file": entry["file"], "topology": name, "rows": ROWS, "length": length}
                | {"hbm": hbm}
            )
    return compiled


def _compile(name: str, path: pathlib.Path, stored: Specs, inputs: Sequence[tuple]) -> dict:
    chip = topology.parse(name)
    mesh = Mesh(np.array(topology.devices(name)[:1]), ("device",))
    make = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    weights = {key: make(spec.shape, spec.dtype) for key, spec in stored.items()}
    inputs = [make(shape, np.dtype(dtype)) for shape, dtype in inputs]
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    try:
        with topology.compiling_for(mesh):
            program = jax.jit(exported.call).lower(weights, *inputs).compile()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"{path.name}: does not compile for {name}: {error}") from error
    hbm = report.program_memory(program, chip)
    return {part: int(hbm[part]) for part in ("arguments", "temporaries", "total")}
