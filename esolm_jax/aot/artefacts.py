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

ROWS, TOKENS = 8, 64  # of a call; the tokens of a wide pass


def check(names: Sequence[str]) -> None:
    """UserError: an unknown topology, or one whose compiler is not installed."""
    for name in names:
        topology.devices(name)


def dimensions(length: int) -> dict[str, int]:
    """Sizes of the dynamic dimensions (signatures.py): 8 texts of `length` tokens, half of them in
    wide passes, and one token per pass."""
    wide = min(TOKENS, length)
    return {
        "b": ROWS,
        "t": length,
        "s": length,
        "l": length,
        **{"n": max(1, length // wide // 2), "v": 2 * wide, "p": wide},
        **{"m": max(1, length // 2), "w": 2, "q": 1},
    }


def compile_all(names: Sequence[str], source: Source, entries: Sequence[Mapping]) -> list[dict]:
    """Compiles each StableHLO file as it was written, for the first device of each topology.

    Args:
      entries: of the manifest.

    Returns, for each file and topology: file, topology, rows, length, and `hbm`, the bytes of
    arguments, temporaries and in total.
    """
    stored, compiled = source.stored(), []
    for name in names:
        mesh = Mesh(np.array(topology.devices(name)[:1]), ("device",))
        for entry in entries:
            if entry["file"].endswith(".stablehlo"):
                hbm = _compile(name, mesh, source.folder / entry["file"], stored, entry, source)
                compiled.append(
                    {"file": entry["file"], "topology": name, "rows": ROWS}
                    | {"length": source.plan["length"], "hbm": hbm}
                )
    return compiled


def _compile(name, mesh, path: pathlib.Path, stored, entry: Mapping, source: Source) -> dict:
    chip, sizes = topology.parse(name), dimensions(source.plan["length"])
    make = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    weights = {key: make(spec.shape, spec.dtype) for key, spec in stored.items()}
    inputs = [
        make(tuple(sizes.get(dim, dim) for dim in array["shape"]), np.dtype(array["dtype"]))
        for array in entry["inputs"]
    ]
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    try:
        with topology.compiling_for(mesh):
            program = jax.jit(exported.call).lower(weights, *inputs).compile()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"{path.name}: does not compile for {name}: {error}") from error
    hbm = report.program_memory(program, chip)
    return {part: int(hbm[part]) for part in ("arguments", "temporaries", "total")}
