"""The code that a GPU's compiler makes of our kernels: docs/kernel_code.{json,md}.

    JAX_PLATFORMS=cpu python -m benchmarks.kernel_code [--nvdisasm=PATH] [--out=docs/kernel_code]

Registers, spilled bytes, whether products wait for each other, and the instructions of the main
loop. Needs no GPU: pip install 'esolm_jax[gpu-compiler]', and nvidia-cuda-nvdisasm for the
instructions. Half a minute.
"""

import argparse
import collections
import dataclasses
import functools
import importlib.util
import pathlib
import re
import subprocess
import tempfile

import jax
import numpy as np

from benchmarks import report_writer
from benchmarks.attention import passes
from esolm_jax.aot import topology
from esolm_jax.attention import flash, flash_kernels
from esolm_jax.attention.attend import attend
from esolm_jax.parallel import sharding

LENGTH = 1024  # tokens
OPERATIONS = {"MUFU": "special", "HGMMA": "matrix", "HMMA": "matrix"}


@dataclasses.dataclass(frozen=True)
class Case:
    """Forward and backward pass of flash attention over causal labels."""

    gpu: str
    width: int
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"{self.gpu}, heads {self.width} wide, {self.dtype}"


CASES = [
    Case("h100", 64),
    Case("h100", 128),
    Case("h100", 256),
    Case("h100", 64, "float32"),
    Case("a100", 64),
    Case("a100", 128),
]


@dataclasses.dataclass
class Code:
    """What the compiler says of one kernel.

    Attributes:
      own, warps, stages: of its programs, see flash.Shape.
      spilled: bytes stored to memory because registers did not suffice.
      waits: whether the products of a warpgroup run one by one.
      loop: instructions of the largest loop of each kind; {} without nvdisasm.
    """

    own: int
    warps: int
    stages: int
    registers: int
    spilled: int
    waits: bool
    loop: dict[str, int]


def dump_to(folder: str) -> dict[str, str]:
    """Compiler options that write the PTX of all kernels to a folder."""
    return {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}


def compile_into(folder: str, case: Case, device) -> None:
    """Writes the PTX of the kernels of a case."""
    mesh = sharding.mesh_of(device)
    everywhere = sharding.replicated(mesh)
    tokens = passes(LENGTH)["ar, eso_b diffusion"]
    tokens = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((8, a.shape[1]), a.dtype, sharding=everywhere), tokens
    )
    q = jax.ShapeDtypeStruct((8, 12, LENGTH, case.width), case.dtype, sharding=everywhere)

    def gradients(tokens, q, k, v, grad):
        run = functools.partial(attend, queries=tokens, keys=tokens, kind="flash", mesh=mesh)
        return jax.vjp(run, q, k, v)[1](grad)

    with topology.compiling_for(mesh):
        lowered = jax.jit(gradients).lower(tokens, q, q, q, q)
        lowered.compile(compiler_options=dump_to(folder))


def tool() -> str:
    """NVIDIA's assembler, of the package that XLA uses."""
    nvidia = importlib.util.find_spec("nvidia")
    found = nvidia and importlib.util.find_spec("nvidia.cuda_nvcc")
    if found is None:
        raise SystemExit("needs the GPU compiler: pip install 'esolm_jax[gpu-compiler]'")
    return str(pathlib.Path(next(iter(found.submodule_search_locations))) / "bin" / "ptxas")


def codes(case: Case, nvdisasm: str = "") -> dict[str, Code]:
    """The code of each kernel of a case."""
    found = {}
    (device,) = topology.devices(f"{case.gpu}:1")
    blocks = LENGTH * np.dtype(case.dtype).itemsize // flash.BLOCK_BYTES
    with tempfile.TemporaryDirectory() as folder:
        compile_into(folder, case, device)
        for path in sorted(pathlib.Path(folder).glob("*.ptx")):
            if name := re.search(r"\.entry flash_(\w+)", path.read_text()):
                kernel = getattr(flash_kernels, name[1])
                shape = flash.shape(kernel, case.width, blocks, flash.capability(device))
                found[name[1]] = Code(*shape, *assembled(path, nvdisasm))
    return found


def assembled(path: pathlib.Path, nvdisasm: str) -> tuple:
    """The last four attributes of Code."""
    binary = path.with_suffix(".cubin")
    architecture = re.search(r"\.target (\w+)", path.read_text())[1]
    command = [tool(), "-v", f"-arch={architecture}", str(path), "-o", str(binary)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled, registers = (
        int(re.search(pattern, report)[1])
        for pattern in (r"(\d+) bytes spill stores", r"Used (\d+) registers")
    )
    loop = main_loop(binary, nvdisasm) if nvdisasm else {}
    return registers, spilled, "instructions are serialized" in report, loop


def main_loop(binary: pathlib.Path, nvdisasm: str) -> dict[str, int]:
    """Instructions of the largest loop."""
    command = [nvdisasm, "-c", str(binary)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels, instructions, loops = {}, [], [[]]
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(.*?) *;", line):
            instructions.append(instruction[1])
            target = re.match(r"BRA .*?(\.L_\w+)", instruction[1])
            if target and target[1] in labels:  # it goes back
                loops.append(instructions[labels[target[1]] :])
    kinds = [re.split(r"[ .]", instruction)[0] for instruction in max(loops, key=len)]
    return {"all": len(kinds)} | collections.Counter(
        OPERATIONS[kind] for kind in kinds if kind in OPERATIONS
    )


def page(found: dict[str, dict[str, Code]]) -> str:
    head = ["kernel", "blocks", "warps", "stages", "registers", "bytes spilled", "products wait"]
    counts = {"all": "instructions of the loop", "special": "of them special functions"}
    counts["matrix"] = "matrix products"
    has_counts = any(code.loop for kernels in found.values() for code in kernels.values())
    head += counts.values() if has_counts else []
    text = ""
    for name, kernels in found.items():
        rows = []
        for kernel, code in kernels.items():
            cells = [kernel, code.own, code.warps, code.stages, code.registers, code.spilled]
            cells += ["yes" if code.waits else "no"]
            rows.append([*cells, *(code.loop.get(n, 0) for n in counts if has_counts)])
        text += f"\n## {name}\n\n{report_writer.table(head, rows)}"
    return f"""# The code of the GPU kernels of attention

Made by `python -m benchmarks.kernel_code --nvdisasm=PATH` (jax {jax.__version__}) with NVIDIA's assembler and disassembler,
without a GPU. A kernel is as fast as it issues instructions, unless registers are spilled to memory or, on an H100, the
products of a warpgroup wait for each other. A loop computes one block of keys (of queries, in the keys kernel) for the
blocks of a program; its instructions are those of one warp. Blocks are 64 tokens in bfloat16, 32 in float32. The
instructions include the evaluation of the rule, about a fourth, which is skipped where all is visible. None of it is a
measured time.
{text}"""  # noqa: E501


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nvdisasm", default="", help="NVIDIA's disassembler, a path")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/kernel_code"))
    args = parser.parse_args()
    found = {case.name: codes(case, args.nvdisasm) for case in CASES}
    figures = {
        name: {kernel: dataclasses.asdict(code) for kernel, code in kernels.items()}
        for name, kernels in found.items()
    }
    report_writer.write(args.out, figures, page(found))


if __name__ == "__main__":
    main()
