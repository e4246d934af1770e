"""python -m benchmarks.estimators_suite: the errors that a suite prints against their spread.

Evaluates every data set of the zero-shot suite (invented texts, as in benchmarks.zeroshot) with
--seeds seeds, by the default protocol and by the published one. The default protocol's error is of
other noise for the same windows. The published protocol's is over batches, of other windows too, so
its windows are drawn anew for each seed in half of its rows. Writes --out (.json and .md).
"""

import argparse
import itertools
import math
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np

from benchmarks import report_writer, zeroshot
from esolm_jax.config import overridden
from esolm_jax.data import reader
from esolm_jax.evaluation.suite import suite_data, suite_file, suite_run
from esolm_jax.parallel import sharding
from esolm_jax.training import checkpoint_meta, restore

BATCH = 32  # as published
ORDERS = 4
RESAMPLES = 2000  # of the bootstrap
NOISE, WINDOWS = "noise", "windows and noise"
MIXTURE, MIXED_WINDOWS = "mixture of all", 128

PAGE = """# Standard errors of a suite against their spread

Made by `python -m benchmarks.estimators_suite` at commit {commit} on {machine}.

{table}
Each row is one figure of `evaluate --suite`, estimated with {seeds} seeds, on {count} data sets of
invented text (`benchmarks/zeroshot_files.py`) and on a mixture of their windows. The model is a
briefly trained Eso-LM (B), α₀ = 0.5, width 32, 2 blocks, L = 64; {batch} windows in a batch.

- Varied: what differs between seeds. `{noise}`: the same windows. `{both}`: as many windows,
  drawn from those of the data set with replacement, and noise.
- Spread: the standard deviation over seeds. Printed error: the root mean square of the {seeds}
  printed ones. The ± of their ratio is its standard error, by a bootstrap over seeds.
- The printed error of `all` is of other noise for the same windows. That of `published` is over
  batches, hence of other windows and other noise: one draw a window cannot tell them apart. Windows
  of one invented text differ little, so both spreads are about equal; those of the mixture differ
  more.
- Importance-weighted errors are the jackknife's: on average at least the spread with one order
  less.

{summary}
"""


def ratio_error(values: np.ndarray, errors: np.ndarray) -> float:
    """Standard error of (root mean square of errors) / (spread of values), by a bootstrap."""
    chosen = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    spread = values[chosen].std(axis=1, ddof=1)
    return float(np.std(np.sqrt((errors[chosen] ** 2).mean(axis=1)) / spread, ddof=1))


def compare(figures: list[dict]) -> dict:
    """Spread and printed errors of the figures of one bound, one for each seed."""
    values = np.array([f["nll_per_token"] for f in figures])
    errors = np.array([f["standard_error"] for f in figures])
    spread, printed = float(values.std(ddof=1)), math.sqrt(np.mean(errors**2))
    off = abs(values - values.mean()) * math.sqrt(len(values) / (len(values) - 1))
    return {
        "mean": float(values.mean()),
        "spread": spread,
        "printed_rms": printed,
        "printed_over_spread": printed / spread,
        "ratio_error": ratio_error(values, errors),
        "within_two_errors": float(np.mean(off < 2 * errors)),
    }


def windows_of(manifest) -> dict:
    """All windows of a prepared data set, as one batch."""
    count = reader.num_windows(manifest, suite_run.SPLIT, 0)
    (batch,) = reader.eval_batches(manifest, suite_run.SPLIT, batch_size=count)
    return batch


def batches(windows: dict, chosen: np.ndarray, mesh):
    """The chosen windows in batches of BATCH, the last one padded."""
    for start in range(0, len(chosen), BATCH):
        part = chosen[start : start + BATCH]
        missing = [(0, BATCH - len(part)), (0, 0)]
        yield sharding.put_batch(
            {k: np.pad(a[part], missing) for k, a in windows.items()}, mesh, BATCH
        )


def pools(manifests: dict, data_sets) -> Iterator[tuple[str, dict, np.ndarray]]:
    """(title, all windows, numbers of the fixed ones) of each data set, and of a mixture of them,
    whose windows differ more."""
    windows = {one.title: windows_of(manifests[one.name][1]) for one in data_sets}
    for title, pool in windows.items():
        count = len(pool["x"])
        yield title, pool, np.arange(count - (count % BATCH == 1))  # 1 left cannot be split
    mixed = {
        key: np.concatenate([pool[key] for pool in windows.values()]) for key in ("x", "valid")
    }
    yield MIXTURE, mixed, np.random.default_rng(1).permutation(len(mixed["x"]))[:MIXED_WINDOWS]


def of_protocol(config, workdir, request, trained, seeds: int, varied: tuple[str, ...]) -> list:
    """The rows of a protocol: every pool of windows, bound, and what is varied."""
    rows = []
    made = list(suite_run.estimators(config, request.protocol, trained))
    manifests = suite_run.prepared(config, workdir, request, trained)
    split = next(iter(manifests.values()))[1].split(suite_run.SPLIT)  # for bits per byte
    for title, windows, fixed in pools(manifests, request.present):
        for (name, estimate), what in itertools.product(made, varied):
            figures = []
            for seed in range(seeds):
                drawn = np.random.default_rng(seed).integers(len(windows["x"]), size=len(fixed))
                chosen = drawn if what == WINDOWS else fixed
                given = batches(windows, chosen, trained.built.mesh)
                figures.append(estimate(trained.params, given, split=split, seed=seed).figures)
            about = {"protocol": request.protocol, "data_set": title, "bound": name}
            rows.append(about | {"windows": len(fixed), "varied": what} | compare(figures))
            print(rows[-1], flush=True)
    return rows


def measure(folder: pathlib.Path, scale: int, steps: int, seeds: int) -> dict:
    model = zeroshot.make_model(folder, scale, steps)
    config = checkpoint_meta.saved_config(model.workdir)
    config = overridden(config, {"eval.batch_size": BATCH, "eval.num_orders": ORDERS})
    mesh = sharding.make_mesh(config.mesh)
    trained = restore.load_trained(config, model.workdir, "ema", mesh)
    suite = suite_file.read("zeroshot")
    files = suite_data.find(suite.data_sets, model.data_root)
    rows = []
    for protocol, varied in (("all", (NOISE,)), ("published", (NOISE, WINDOWS))):
        request = suite_run.Request(suite, model.data_root, files, protocol, {})
        rows += of_protocol(config, model.workdir, request, trained, seeds, varied)
    rows.sort(key=lambda row: (row["protocol"], row["bound"], row["varied"]))  # stable
    return {"seeds": seeds, "batch_size": BATCH, "num_orders": ORDERS, "rows": rows}


def summary_lines(rows: list[dict]) -> str:
    """For each kind of row: the mean ratio, and how many ratios are within 2 errors of 1."""
    lines = ["Over the data sets and the mixture:", ""]
    for kind in dict.fromkeys((r["protocol"], r["bound"], r["varied"]) for r in rows):
        found = [r for r in rows if (r["protocol"], r["bound"], r["varied"]) == kind]
        ratio = np.array([r["printed_over_spread"] for r in found])
        error = np.array([r["ratio_error"] for r in found])
        mean, of_mean = ratio.mean(), math.sqrt((error**2).sum()) / len(found)
        close = int((abs(ratio - 1) < 2 * error).sum())
        lines.append(
            f"- `{kind[0]}`, {kind[1]}, {kind[2]} varied: mean ratio {mean:.2f} ± {of_mean:.2f}, "
            f"from {ratio.min():.2f} to {ratio.max():.2f}; {close} of {len(found)} are within 2 of "
            "their errors of 1."
        )
    return "\n".join(lines)


def page(report: dict) -> str:
    rows = [
        [
            f"`{r['protocol']}`",
            r["bound"].replace("_", " "),
            r["varied"],
            r["data_set"],
            r["windows"],
        ]
        + [f"{r['mean']:.4f}", f"{r['spread']:.4f}", f"{r['printed_rms']:.4f}"]
        + [f"{r['printed_over_spread']:.2f} ± {r['ratio_error']:.2f}"]
        + [f"{r['within_two_errors']:.0%}"]
        for r in report["rows"]
    ]
    head = "protocol", "bound", "varied", "data set", "windows", "nats per token", "spread"
    head += "printed error", "printed / spread", "within 2 errors"
    return PAGE.format(
        commit=report_writer.commit(),
        machine=report_writer.machine(),
        table=report_writer.table(head, rows),
        seeds=report["seeds"],
        count=len({r["data_set"] for r in report["rows"]} - {MIXTURE}),
        batch=report["batch_size"],
        noise=NOISE,
        both=WINDOWS,
        summary=summary_lines(report["rows"]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--scale", type=int, default=500, help="sentences of each data set")
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/estimators_suite"))
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(pathlib.Path(folder), a.scale, a.steps, a.seeds)
    report_writer.write(a.out, report, page(report))


if __name__ == "__main__":
    main()
