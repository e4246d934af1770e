"""Speed on one GPU: docs/gpu.{json,md,png}.

    python -m benchmarks.gpu [--match=decode] [--out=docs/gpu] [--published=DIR]
    JAX_PLATFORMS=cpu python -m benchmarks.gpu --dry_run --out=/tmp/gpu    # tiny sizes, any device

Decoding and training with random weights, beside the device's own matrix products and copies. Under
ten minutes on an H100. A case that fails is listed with its error; figures are written after each
case. The page lists the goals, and whether they are met. With --published=DIR, a checkout of the
published PyTorch code (--published_python has torch and einops), that code runs on the same device
first: its training, and its sampling with both of the paper's timings.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import config_files, gpu_report, report_writer
from benchmarks.published_process import PublishedProcess, shapes
from benchmarks.sampling_cases import random_params
from esolm_jax import config as config_lib
from esolm_jax import results
from esolm_jax.aot import decoding, lower_bound
from esolm_jax.data.manifest import planned_tokenizer
from esolm_jax.model import build
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine import network as network_lib
from esolm_jax.sampling.engine import project
from esolm_jax.training.train_step import Trainer

ROUNDS = 3
STEPS = 5  # of training, in a round
TINY = {"model.width": 64, "model.blocks": 2, "model.heads": 2, "data.vocab_size": 999}


@dataclasses.dataclass(frozen=True)
class Case:
    """A measurement of configs/FILE.py:OBJECTIVE.

    Attributes:
      what: "decode", one token per pass, or "train".
      rows: texts, or rows of a batch.
      goal: ms per pass at most; the share of the matrix products' speed at least; or of the
        bandwidth at least, below 1 for decoding.
      attention: config.model.attention.
      by_xla: of decoding, whether XLA computes all products, not our kernel.
    """

    what: str
    file: str
    objective: str
    length: int
    rows: int
    goal: float
    attention: str = "auto"
    by_xla: bool = False

    @property
    def in_published(self) -> bool:
        """Whether the published code is measured, too. At 8192 tokens it takes minutes."""
        is_default = self.attention == "auto" and not self.by_xla
        return self.file == "owt" and self.length <= 1024 and is_default

    @property
    def name(self) -> str:
        name = f"{self.what} {self.file}:{self.objective}, {self.rows} x {self.length}"
        name += f", {self.attention}" if self.attention != "auto" else ""
        return name + (", products by XLA" if self.by_xla else "")

    def config(self, dry_run: bool):
        length = min(self.length, 64) if dry_run else self.length
        rows = min(self.rows, 4) if dry_run else self.rows
        config = config_files.on_one_device(self.file, self.objective, length=length, rows=rows)
        config.model.remat = "operands"
        config.model.attention = self.attention
        if dry_run:  # any device has an "auto"
            config.update_from_flattened_dict(TINY | {"model.attention": "auto"})
        config_lib.validate(config)
        return config


CASES = [
    Case("decode", "owt", "0.5", 1024, 1, 0.25),
    Case("decode", "owt", "0.5", 1024, 32, 0.6),
    Case("decode", "owt", "0.5", 1024, 1, 0.25, by_xla=True),
    Case("decode", "owt", "0.5", 8192, 1, 0.35),
    Case("decode", "owt", "ar", 1024, 1, 0.25),
    Case("decode", "2b", "0.5", 1024, 1, 0.6),
    Case("train", "owt", "0.5", 1024, 32, 0.5),
    Case("train", "owt", "mdlm", 1024, 32, 0.5),
    Case("train", "owt", "ar", 1024, 32, 0.5),
    Case("train", "owt", "mdlm", 1024, 32, 0.5, "cudnn"),
    Case("train", "owt", "ar", 1024, 32, 0.5, "cudnn"),
]


def best_seconds(run: Callable, rounds: int = ROUNDS) -> float:
    """The least of several runs, after one that warms up."""
    jax.block_until_ready(run())
    taken = []
    for _ in range(rounds):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - begin)
    return min(taken)


def ceilings(dry_run: bool) -> dict[str, float]:
    """FLOP/s of a bfloat16 matrix product, and bytes/s of a copy that is read and written."""
    side = 256 if dry_run else 8192
    a = jnp.ones((side, side), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    big = jnp.ones((2**16 if dry_run else 2**30,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return {
        "flops": 2 * side**3 / best_seconds(lambda: product(a), 10),
        "bandwidth": 2 * big.nbytes / best_seconds(lambda: copy(big), 5),
    }


def measure_published(directory: str, python: str, cases: list[Case], dry_run: bool) -> dict:
    """The published code's figures by name of a case; its own process, which has ended."""
    device = "cpu" if dry_run else "cuda"
    process = PublishedProcess("published_gpu.py", directory, python, {"device": device})
    found = {"about": process.about, "cases": {}}
    for case in cases:
        if not case.in_published:
            continue
        config = case.config(dry_run)
        answer = process.ask(
            {
                "what": case.what,
                "objective": config.objective,
                "alpha_0": config.alpha_0,
                "shapes": shapes(config, config.data.vocab_size),
                "rows": config.sample.num_texts,
                "steps": 1 if dry_run else STEPS,
                "dry_run": dry_run,
            }
        )
        print(f"published, {case.name}: {answer}", flush=True)
        found["cases"][case.name] = answer
    process.close()
    return found


def over_published(ours: dict, published: dict) -> dict:
    """The published code's time over ours, by timing; {} where either has none."""
    if "error" in ours or "error" in published:
        return {}
    if "ms_per_step" in ours:
        return {"training": published["ms_per_step"] / ours["ms_per_step"]}
    names = "with sampling", "passes only"
    return {name: published[name]["ms_per_pass"] / ours[name]["ms_per_pass"] for name in names}


def build_of(config) -> build.BuiltModel:
    mesh = sharding.make_mesh(config.mesh)
    return build.build_model(config, planned_tokenizer(config), mesh)


def decode(case: Case, limits: dict, dry_run: bool) -> dict:
    """The whole generation, by the loop that `sample` runs: drawing tokens, and greedy."""
    config = case.config(dry_run)
    built = build_of(config)
    params = random_params(built.model)
    params = jax.device_put(params, sharding.parameters(built.mesh, params))
    network = network_lib.fold(built.model, params, built.mesh)
    del params
    figures: dict = {}
    for name, temperature in (("with sampling", 1.0), ("passes only", 0.0)):
        config.sample.temperature = temperature
        generator = decoding.generator(config, built)
        begin = time.perf_counter()
        most = 0 if case.by_xla else project.MOST_TOKENS
        with mock.patch.object(project, "MOST_TOKENS", most):
            generate = generator.compile(network)
        compiled = time.perf_counter() - begin
        passes = generator.plan.nfe
        seconds = best_seconds(lambda run=generate: run(network).text) / passes
        needed = decoding.necessary_bytes(network, generator)
        figures[name] = {
            "ms_per_pass": 1e3 * seconds,
            "tokens_per_second": float(generator.canvas.length.sum()) / seconds / passes,
            "share_of_bandwidth": needed / seconds / limits["bandwidth"],
            "compile_seconds": compiled,
        }
    measured = figures["with sampling"]
    ms, share = measured["ms_per_pass"], measured["share_of_bandwidth"]
    by_share = case.file == "2b"
    return figures | {
        "goal": f">= {case.goal:.0%} of bandwidth" if by_share else f"<= {case.goal} ms",
        "met": bool(share >= case.goal if by_share else ms <= case.goal),
    }


def train(case: Case, limits: dict, dry_run: bool) -> dict:
    """Steps of the program that `train` runs, on one batch."""
    config = case.config(dry_run)
    training = Trainer(config, build_of(config))
    begin = time.perf_counter()
    abstract = training.abstract_state(), training.abstract_batch()
    step = training.step_fn().lower(*abstract).compile()
    compiled = time.perf_counter() - begin
    shape = config.train.batch_size, config.data.seq_len
    x = np.random.default_rng(0).integers(config.data.vocab_size, size=shape, dtype=np.int32)
    batch = sharding.put_batch(
        {"x": x, "valid": np.ones(shape, bool)}, training.built.mesh, shape[0]
    )
    state = training.init()

    def steps():
        nonlocal state
        for _ in range(STEPS):
            state, metrics = step(state, batch)
        return metrics["loss"]

    seconds = best_seconds(steps) / STEPS
    assert np.isfinite(steps()), "the loss must be finite"
    work = lower_bound.step(config, training.phases)
    flops = sum(lower_bound.flops(training.built.model, work).values())
    stats = jax.devices()[0].memory_stats() or {}
    share = flops / seconds / limits["flops"]
    return {
        "ms_per_step": 1e3 * seconds,
        "tokens_per_second": x.size / seconds,
        "share_of_matrix_products": share,
        "compile_seconds": compiled,
        "peak_memory_bytes": stats.get("peak_bytes_in_use"),
        "goal": f">= {case.goal:.0%} of matrix products",
        "met": bool(share >= case.goal),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--match", default="", help="part of a case's name")
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/gpu"))
    parser.add_argument("--published", default="", help="a checkout of the published code")
    parser.add_argument("--published_python", default=sys.executable, help="has torch, einops")
    args = parser.parse_args()
    cases = [case for case in CASES if args.match in case.name]
    found: dict = {"dry_run": args.dry_run, "cases": {}}
    if args.published:  # before JAX takes the device's memory
        found["published"] = measure_published(
            args.published, args.published_python, cases, args.dry_run
        )
    device = jax.devices()[0]
    if device.platform != "gpu" and not args.dry_run:
        parser.error(f"JAX finds no GPU, only {device.device_kind}; --dry_run tries the script")
    found["device"], found["ceilings"] = device.device_kind, ceilings(args.dry_run)
    theirs = found.get("published", {"cases": {}})["cases"]
    for case in cases:
        measure = {"decode": decode, "train": train}[case.what]
        try:
            found["cases"][case.name] = measure(case, found["ceilings"], args.dry_run)
        except Exception as error:  # the other cases are measured all the same
            found["cases"][case.name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        if case.name in theirs:
            ratios = over_published(found["cases"][case.name], theirs[case.name])
            found["cases"][case.name]["over_published"] = ratios
        jax.clear_caches()
        print(f"{case.name}: {found['cases'][case.name]}", flush=True)
        results.write_json(args.out.with_suffix(".json"), found)
    report_writer.write(
        args.out, found, gpu_report.page(found), lambda path: gpu_report.draw(found, path)
    )


if __name__ == "__main__":
    main()
