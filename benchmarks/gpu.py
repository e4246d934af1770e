"""Speed on one GPU: docs/gpu.{json,md,png}.

    python -m benchmarks.gpu [--match=decode] [--out=docs/gpu]
    JAX_PLATFORMS=cpu python -m benchmarks.gpu --dry_run --out=/tmp/gpu    # tiny sizes, any device

Decoding and training with random weights, beside the device's own matrix products and copies. Under
ten minutes on an H100. A case that fails is listed with its error; figures are written after each
case. The page lists the goals, and whether they are met.
"""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import config_files, report_writer
from benchmarks.sampling_cases import random_params
from esolm_jax import config as config_lib
from esolm_jax import results
from esolm_jax.aot import decoding, lower_bound
from esolm_jax.data.manifest import planned_tokenizer
from esolm_jax.model import build
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine import network as network_lib
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
    """

    what: str
    file: str
    objective: str
    length: int
    rows: int
    goal: float

    @property
    def name(self) -> str:
        return f"{self.what} {self.file}:{self.objective}, {self.rows} x {self.length}"

    def config(self, dry_run: bool):
        length = min(self.length, 64) if dry_run else self.length
        rows = min(self.rows, 4) if dry_run else self.rows
        config = config_files.on_one_device(self.file, self.objective, length=length, rows=rows)
        config.model.remat = "matmuls"
        if dry_run:
            config.update_from_flattened_dict(TINY)
        config_lib.validate(config)
        return config


CASES = [
    Case("decode", "owt", "0.5", 1024, 1, 0.25),
    Case("decode", "owt", "0.5", 1024, 32, 0.6),
    Case("decode", "owt", "0.5", 8192, 1, 0.35),
    Case("decode", "owt", "ar", 1024, 1, 0.25),
    Case("decode", "2b", "0.5", 1024, 1, 0.6),
    Case("train", "owt", "0.5", 1024, 32, 0.5),
    Case("train", "owt", "mdlm", 1024, 32, 0.5),
    Case("train", "owt", "ar", 1024, 32, 0.5),
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


def page(found: dict) -> str:
    rows = []
    for name, f in found["cases"].items():
        if "error" in f:
            rows.append([name, "failed", f["error"], "", "", ""])
        elif "ms_per_step" in f:
            share = f"{f['share_of_matrix_products']:.0%} of matrix products"
            speed = f"{f['tokens_per_second']:,.0f}"
            rows.append(
                [name, f"{f['ms_per_step']:.1f} ms/step", speed, share, f["goal"], f["met"]]
            )
        else:
            a, b = f["with sampling"], f["passes only"]
            ms = f"{a['ms_per_pass']:.3f} ms/pass (greedy {b['ms_per_pass']:.3f})"
            share = f"{a['share_of_bandwidth']:.0%} of bandwidth"
            speed = f"{a['tokens_per_second']:,.0f}"
            rows.append([name, ms, speed, share, f["goal"], f["met"]])
    head = ["case", "time", "tokens/s", "share", "goal", "met"]
    limits = found["ceilings"]
    what = ", a dry run of tiny models that measures nothing" if found["dry_run"] else ""
    return f"""# Speed on one {found["device"]}{what}

Made by `python -m benchmarks.gpu` (jax {jax.__version__}). Random weights, bfloat16, one token per pass. Matrix products of
8192 x 8192 run at {limits["flops"] / 1e12:.0f} TFLOP/s, a copy moves {limits["bandwidth"] / 1e12:.2f} TB/s. Shares are of these; FLOPs and bytes are lower
bounds from the model's shape.

{report_writer.table(head, rows)}"""  # noqa: E501


def draw(found: dict, path: pathlib.Path) -> None:
    """The share of what the device can do, of each case."""
    import matplotlib.pyplot as plt

    shares = {
        name: f.get("share_of_matrix_products") or f["with sampling"]["share_of_bandwidth"]
        for name, f in found["cases"].items()
        if "error" not in f
    }
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(shares) + 1.5))
    axes.barh(list(shares)[::-1], [100 * share for share in shares.values()][::-1])
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the device's matrix products (training) or bandwidth (decoding)")
    axes.set_title(found["device"])
    figure.savefig(path, bbox_inches="tight", dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--match", default="", help="part of a case's name")
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/gpu"))
    args = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu" and not args.dry_run:
        parser.error(f"JAX finds no GPU, only {device.device_kind}; --dry_run tries the script")
    found: dict = {"device": device.device_kind, "dry_run": args.dry_run, "cases": {}}
    found["ceilings"] = ceilings(args.dry_run)
    for case in CASES:
        if args.match not in case.name:
            continue
        measure = {"decode": decode, "train": train}[case.what]
        try:
            found["cases"][case.name] = measure(case, found["ceilings"], args.dry_run)
        except Exception as error:  # the other cases are measured all the same
            found["cases"][case.name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        jax.clear_caches()
        print(f"{case.name}: {found['cases'][case.name]}", flush=True)
        results.write_json(args.out.with_suffix(".json"), found)
    report_writer.write(args.out, found, page(found), lambda path: draw(found, path))


if __name__ == "__main__":
    main()
