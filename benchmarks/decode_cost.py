"""What one pass of the decoding loop launches and moves: docs/decode_cost.{json,md}.

    JAX_PLATFORMS=cpu python -m benchmarks.decode_cost [--match=h100] [--out=docs/decode_cost]

Compiles the loop that `sample` runs, for GPUs and TPUs, without them (`pip install
'esolm_jax[tpu,gpu-compiler]'`); a few minutes on two cores. Exit code 1 if a figure breaks its bar.
Earlier figures stay in the JSON until they are replaced.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

import jax

from benchmarks import config_files, report_writer
from esolm_jax import compile as compile_lib
from esolm_jax import config as config_lib
from esolm_jax import results
from esolm_jax.aot import decoding, topology

BYTES_RATIO = 1.3
KERNELS = {12: 150}  # blocks → most kernels of a pass of one token, on a GPU
COMPILE_SECONDS = 60.0  # on a GPU


@dataclasses.dataclass(frozen=True)
class Case:
    """Texts of `length` tokens from a config file, on the first device of a topology.

    Attributes:
      steps: config.sample.steps; 0 = one token per pass.
      dtype: of the weights and the KV cache; auto = the model's.
    """

    file: str
    objective: str
    topology: str
    length: int
    texts: int
    steps: int = 0
    dtype: str = "auto"

    @property
    def name(self) -> str:
        steps = f", T = {self.steps}" if self.steps else ""
        dtype = f", {self.dtype}" if self.dtype != "auto" else ""
        kind = self.topology.split(":")[0]
        return f"{self.file}:{self.objective} {kind}, {self.texts} x {self.length}{steps}{dtype}"

    def config(self):
        config = config_files.on_one_device(
            self.file, self.objective, length=self.length, rows=self.texts
        )
        config.train.batch_size = 2 * self.texts  # not compiled, but checked: rows for each loss
        config.sample.steps = self.steps
        config.sample.weight_dtype = config.sample.cache_dtype = self.dtype
        config_lib.validate(config)
        return config


CASES = [
    *[
        Case("owt", "0.5", name, length, texts)
        for name in ("h100:1", "v5e:2x2")
        for length in (1024, 8192)
        for texts in (1, 32)
    ],
    Case("owt", "0.5", "h100:1", 1024, 1, steps=256),
    Case("owt", "ar", "h100:1", 1024, 1),
    Case("owt", "mdlm", "h100:1", 1024, 1, steps=256),
    Case("2b", "0.5", "h100:1", 1024, 1),
    Case("owt", "0.5", "h100:1", 1024, 1, dtype="int8"),
    Case("owt", "0.5", "h100:1", 1024, 32, dtype="int8"),
    Case("owt", "0.5", "v5e:2x2", 1024, 32, dtype="int8"),
]


def measure(case: Case) -> dict:
    config = case.config()
    training = compile_lib.make_training(config, case.topology)
    return decoding.measure(config, training, topology.parse(case.topology))


def broken(case: Case, figures: dict) -> list[str]:
    """The bars that the figures break."""
    found = []
    if figures["bytes_ratio"] > BYTES_RATIO and not case.steps:
        found.append(f"bytes {figures['bytes_ratio']:.2f} x the necessary ones > {BYTES_RATIO}")
    if figures["conditionals_in_loop"]:
        found.append(f"{figures['conditionals_in_loop']:.0f} conditionals")
    if case.topology.startswith("v"):
        return found
    most = KERNELS.get(figures["blocks"])
    if most and figures["kernels_per_pass"] > most and not case.steps:
        found.append(f"{figures['kernels_per_pass']:.0f} kernels > {most}")
    if figures["kernels_outside_graphs"]:
        found.append(f"{figures['kernels_outside_graphs']} kernels outside of CUDA graphs")
    if figures["compile_seconds"] > COMPILE_SECONDS:
        found.append(f"compiled in {figures['compile_seconds']:.0f} s > {COMPILE_SECONDS:.0f}")
    return found


def page(found: dict[str, dict]) -> str:
    head = ["case", "kernels", "conditionals", "graphs", "outside", "MB moved", "MB necessary"]
    head += ["ratio", "ms at least", "compile s"]
    rows = []
    for name, f in found.items():
        cells = [name, f"{f['kernels_per_pass']:.0f}", f"{f['conditionals_in_loop']:.0f}"]
        cells += [f.get("graphs_per_pass", ""), f.get("kernels_outside_graphs", "")]
        cells += [f"{f['bytes_per_pass'] / 1e6:.1f}", f"{f['necessary_bytes_per_pass'] / 1e6:.1f}"]
        cells += [f"{f['bytes_ratio']:.2f}", f"{1e3 * f['seconds_per_pass_at_least']:.3f}"]
        rows.append([*cells, f"{f['compile_seconds']:.0f}"])
    return f"""# What a pass of decoding costs

Made by `python -m benchmarks.decode_cost` (jax {jax.__version__}) with the compilers of GPUs and TPUs, without the
devices. It compiles the loop that `sample` runs and counts what one pass launches: kernels, conditionals (for which a
GPU's host must wait) and CUDA graphs with the kernels outside of them. MB moved are the operands and results of every
kernel in the device's memory; of the KV cache, the part that is filled on average over the passes. MB necessary are the
weights and that part. "ms at least" is the time to read the necessary bytes at the device's bandwidth. None of it is a
measured time. On a TPU, kernels are instructions of one program, which launch at no cost; scalar ones count.

{report_writer.table(head, rows)}"""  # noqa: E501


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--match", default="", help="part of a case's name")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/decode_cost"))
    args = parser.parse_args()
    path = args.out.with_suffix(".json")
    found = json.loads(path.read_text()) if path.exists() else {}
    faults = []
    for case in CASES:
        if args.match not in case.name:
            continue
        found[case.name] = measure(case)
        jax.clear_caches()
        results.write_json(path, found)
        faults += [f"{case.name}: {fault}" for fault in broken(case, found[case.name])]
        print(f"{case.name}: ratio {found[case.name]['bytes_ratio']:.2f}", flush=True)
    found = {case.name: found[case.name] for case in CASES if case.name in found}
    report_writer.write(args.out, found, page(found))
    for fault in faults:
        print(f"breaks its bar: {fault}")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
