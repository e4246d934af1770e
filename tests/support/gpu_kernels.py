"""Our GPU kernels as the compiler makes them, and what they compute in interpret mode."""

import dataclasses
import pathlib
import re
import tempfile
from unittest import mock

import jax
import numpy as np
import ptx.machine
from jax.experimental import pallas as pl

from benchmarks import kernel_code
from esolm_jax.aot import topology
from esolm_jax.parallel import sharding

CONFLICTS = 2  # times as long as shared memory takes without conflicts, at most


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel: its PTX, and how it is launched."""

    name: str
    text: str
    grid: tuple[int, int, int]
    shared_bytes: int

    def execute(self, call: "Call", late_copies: bool):
        """See ptx.machine.execute."""
        return ptx.machine.execute(
            self.text,
            self.name,
            self.grid,
            self.shared_bytes,
            call.operands,
            call.results,
            late_copies=late_copies,
        )


@dataclasses.dataclass(frozen=True)
class Call:
    """A call in interpret mode: operands and results."""

    name: str
    operands: list[np.ndarray]
    results: list[np.ndarray]


def compile_for(gpu: str, run, arguments, prefix: str) -> list[Compiled]:
    """The kernels with this prefix of run(*arguments), in order. `gpu`: such as "h100"."""
    mesh = sharding.mesh_of(*topology.devices(f"{gpu}:1"))
    everywhere = sharding.replicated(mesh)
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), arguments
    )
    with tempfile.TemporaryDirectory() as folder, topology.compiling_for(mesh):
        jax.jit(run).lower(*shapes).compile(compiler_options=kernel_code.dump_to(folder))
        texts = [path.read_text() for path in pathlib.Path(folder).glob("*.ptx")]
        (launches,) = pathlib.Path(folder).glob("*.thunk_sequence.txt")
        launched = re.findall(
            rf"\] ({prefix}\w*) grid: \[(.*?)\] .*shared_memory: (\d+)", launches.read_text()
        )
    by_name = {name: text for text in texts for name in re.findall(r"\.entry (\w+)", text)}
    return [
        Compiled(name, by_name[name], tuple(map(int, grid.split(", "))), int(shared))
        for name, grid, shared in launched
    ]


def interpret(run, arguments) -> list[Call]:
    """The calls of kernels in run(*arguments)."""
    calls, real = [], pl.pallas_call

    def pallas_call(*args, **kwargs):
        def record(*operands):
            results = real(*args, **kwargs)(*operands)
            arrays = [[np.asarray(a) for a in jax.tree.leaves(of)] for of in (operands, results)]
            calls.append(Call(kwargs["name"], *arrays))
            return results

        return record

    with mock.patch.object(pl, "pallas_call", pallas_call):
        run(*arguments)
    return calls


def check(gpu: str, run, arguments, prefix: str, tolerance: float) -> int:
    """Executes the kernels of run(*arguments, interpret=False) with the operands that they have
    with interpret=True, and compares the results: to `tolerance`, relative to the largest.

    Returns:
      the number of kernels.
    """
    calls = interpret(lambda *a: run(*a, interpret=True), arguments)
    kernels = compile_for(gpu, lambda *a: run(*a, interpret=False), arguments, prefix)
    assert len(kernels) == len(calls)
    for kernel in kernels:  # XLA may launch them in another order
        call = next(c for c in calls if kernel.name.startswith(c.name))
        calls.remove(call)
        for late_copies in (False, True):
            found, races, conflicts = kernel.execute(call, late_copies)
            assert not races, (kernel.name, races)
            assert conflicts < CONFLICTS, (kernel.name, conflicts)
            for a, b in zip(found, call.results, strict=True):
                a, b = (np.asarray(x, np.float32) for x in (a, b))
                np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0)
    return len(kernels)
