"""python -m esolm_jax.compile --config=FILE --topology=v5e:16x16: the cost of a program on TPUs or
GPUs, from their compiler, without the devices.

Compiles the step that `train` runs, a batch of `evaluate`, or the loop that `sample` runs
(--program). Prints, and saves as JSON, the memory, FLOPs and bytes sent of one chip, compared with
lower bounds from the model's shape; of `sample`, what one pass launches and moves. Exit code 1 if
it does not fit.
"""

import math
import pathlib
import sys
import time

import jax
from absl import flags

from esolm_jax import cli, results
from esolm_jax import config as config_lib
from esolm_jax.aot import decoding, evaluation, sweep, topology
from esolm_jax.aot import report as report_lib
from esolm_jax.aot.chips import GIB
from esolm_jax.data.manifest import planned_tokenizer
from esolm_jax.errors import UserError
from esolm_jax.model import build
from esolm_jax.parallel import sharding
from esolm_jax.training.train_step import Trainer

PROGRAMS = ("train", "evaluate", "sample")


def define_flags() -> None:
    flags.DEFINE_string("topology", None, "The devices, such as v5e:16x16, h100:8 or h100:8x8.")
    flags.DEFINE_integer("num_slices", 1, "Number of TPU pods, joined by a slow network.", 1)
    flags.DEFINE_enum("program", "train", PROGRAMS, "What to compile.")
    flags.DEFINE_string("out", None, "The JSON file to write; default compile.json.")
    flags.DEFINE_bool(
        "sweep", False, "Try meshes and remat policies, each in the fewest micro-batches."
    )


def make_training(config, name: str, num_slices: int = 1) -> Trainer:
    """The Trainer of `config` on a pod, with the planned tokenizer of config.data.

    Raises:
      UserError: the topology is unknown, or a size in the config does not divide by it.
    """
    devices = topology.devices(name, num_slices)
    mesh = sharding.make_mesh(config.mesh, devices)
    return Trainer(config, build.build_model(config, planned_tokenizer(config), mesh))


class OutOfMemory(Exception):
    """Needs more memory than a chip has; the message is the compiler's."""


def compile_step(training: Trainer):
    """The compiled training step.

    Raises:
      OutOfMemory: it does not fit in memory.
    """
    arguments = training.abstract_state(), training.abstract_batch()
    try:
        with topology.compiling_for(training.built.mesh):
            return training.step_fn().lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(" ".join(str(error).splitlines()[0].split()[1:])) from error


def describe(config, training: Trainer, name: str, num_slices: int) -> dict:
    return {
        "objective": report_lib.objective_name(config),
        "topology": name,
        "num_slices": num_slices,
        "chips": training.built.mesh.size,
        "mesh": dict(training.built.mesh.shape),
        "attention": training.built.model.attention,
        "remat": config.model.remat,
        "grad_accumulation": config.train.grad_accumulation,
        "batch_size": config.train.batch_size,
        "seq_len": config.data.seq_len,
        "parameters": sum(
            math.prod(leaf.shape) for leaf in jax.tree.leaves(training.abstract_state().params)
        ),
    }


def measure(config, name: str, num_slices: int = 1) -> dict:
    """Compiles a training step and reports on it. See report.report; `hbm` alone, with the
    compiler's message, if it does not fit."""
    training = make_training(config, name, num_slices)
    figures = describe(config, training, name, num_slices)
    begin = time.perf_counter()
    chip = topology.parse(name)
    try:
        compiled = compile_step(training)
    except OutOfMemory as error:
        figures["hbm"] = {"fits": False, "available": chip.hbm_bytes, "message": str(error)}
    else:
        figures |= report_lib.report(training, compiled, chip)
    figures["compile_seconds"] = round(time.perf_counter() - begin, 1)
    return figures


def show(figures: dict) -> None:
    """Prints the figures."""
    mesh = ", ".join(f"{k}={v}" for k, v in figures["mesh"].items() if v > 1)
    print(
        f"{figures['objective']}: {figures['parameters']:,} parameters, {figures['batch_size']} x "
        f"{figures['seq_len']} tokens a step on {figures['chips']} chips of "
        f"{figures['topology']} ({mesh}), remat {figures['remat']}, "
        f"compiled in {figures['compile_seconds']:.0f} s"
    )
    hbm = figures["hbm"]
    if "total" not in hbm:
        print(f"does not fit: {hbm['message']}")
        return
    print(f"\nHBM of one chip, GiB of {hbm['available'] / GIB:.2f}:")
    for part in ("parameters", "ema", "optimizer", "activations", "temporaries"):
        print(f"  {part:<16}{hbm[part] / GIB:8.2f}")
    print(f"  {'total':<16}{hbm['total'] / GIB:8.2f}  {'fits' if hbm['fits'] else 'TOO MUCH'}")
    flops = figures["flops"]
    print("\nTFLOPs of a step on one chip (compiled, lower bound):")
    for kind in flops["lower_bound_by_kind"]:
        compiled = flops["by_kind"].get(kind, 0)
        print(
            f"  {kind:<16}{compiled / 1e12:8.3f}{flops['lower_bound_by_kind'][kind] / 1e12:10.3f}"
        )
    print(
        f"  {'total':<16}{flops['compiled'] / 1e12:8.3f}{flops['lower_bound'] / 1e12:10.3f}  "
        f"ratio {flops['ratio']:.3f}"
    )
    sent = figures["collectives"]
    print("\nMB that one chip sends in a step (compiled, ideal):")
    for kind in sorted(sent["sent"].keys() | sent["ideal"].keys()):
        a, b = sent["sent"].get(kind, 0) / 1e6, sent["ideal"].get(kind, 0) / 1e6
        print(f"  {kind:<20}{a:10.1f}{b:10.1f}")
    print(f"  ratio {sent['ratio']:.3f}; gathers of whole stacks: {len(sent['stray_gathers'])}")
    line = figures["roofline"]
    print(
        f"\nroofline: {1e3 * line['step_seconds']:.1f} ms a step (compute "
        f"{1e3 * line['compute_seconds']:.1f}, memory at least {1e3 * line['memory_seconds']:.1f}, "
        f"network {1e3 * line['network_seconds']:.1f}), MFU at most {line['mfu']:.0%}, "
        f"{figures['tokens_per_step'] / line['step_seconds']:,.0f} tokens/s"
    )
    moved = figures["traffic"]
    print(
        f"{moved['kernels']:,.0f} kernels read and write {moved['bytes'] / 1e9:.1f} GB, "
        f"{1e3 * moved['seconds']:.1f} ms of the memory's bandwidth; one after another, each as "
        f"fast as products or memory allow, they take {1e3 * moved['step_seconds']:.1f} ms (MFU at "
        f"most {moved['mfu']:.0%})"
    )


def main(config, workdir: pathlib.Path | None) -> None:
    del workdir
    f = flags.FLAGS
    if not f.topology:
        raise UserError(f"--topology is missing: must be one of {topology.listed()}")
    config_lib.validate(config)
    jax.config.update("jax_platforms", "cpu")  # the compiler is here, not the devices
    out = pathlib.Path(f.out or "compile.json")
    if f.sweep:
        rows = sweep.run(config, f.topology, f.num_slices, measure)
        sweep.show(rows)
        fits = bool(rows) and rows[0]["hbm"]["fits"]
        figures: object = rows
    elif f.program != "train":
        training = make_training(config, f.topology, f.num_slices)
        program = {"evaluate": evaluation, "sample": decoding}[f.program]
        figures = program.measure(config, training, topology.parse(f.topology))
        program.show(figures)
        fits = figures["hbm"]["fits"]
    else:
        figures = measure(config, f.topology, f.num_slices)
        show(figures)
        fits = figures["hbm"]["fits"]
    results.write_json(out, figures)
    print(f"wrote {out}")
    if not fits:
        sys.exit(1)


CLI = cli.Verb(one_process=True, needs_workdir=False, define_flags=define_flags)

if __name__ == "__main__":
    cli.run(main, CLI)
