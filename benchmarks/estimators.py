"""python -m benchmarks.estimators --workdir=DIR: each estimator's spread against its error.

Estimates each bound with --seeds seeds on the same windows of the test split. The printed standard
error should equal the spread over seeds. DIR holds an Eso-LM (B) on Shakespeare, such as the
quickstart's, for the rows of eso_b (also at values of α₀ other than the trained one). Models of the
other objectives (width 64, 2 blocks) are trained for --other_steps steps in --others, unless they
exist. Writes --out (.json and .md).
"""

import argparse
import dataclasses
import math
import pathlib

import numpy as np

from benchmarks import machine, report_writer
from esolm_jax import config as config_lib
from esolm_jax import train
from esolm_jax.data.manifest import load_data
from esolm_jax.evaluation import likelihood
from esolm_jax.evaluation.batches import eval_batches
from esolm_jax.parallel import sharding
from esolm_jax.training import checkpoint_meta, checkpoint_steps, restore

NOTES = """# Standard errors of the estimators against their spread

Made by `python -m benchmarks.estimators` at commit {commit} on {machine}, {threads} CPU threads,
jax {jax}.

{table}
Each row estimates one figure with {seeds} seeds on the same windows, {batch_size} in a batch.

- Spread: the standard deviation over seeds, with a relative error of {uncertain}.
- Printed error: the root mean square of the {seeds} standard errors. A single draw has none
  (–).
- Differences: independent differences between draws from which one error is estimated. The relative
  error of that estimate is about 1/√(2 × differences).
- eso_b is the quickstart's model at step {step}, trained at α₀ = 0.5. The other models are 64
  wide, have 2 blocks and are briefly trained. They show the noise of estimators, not a perplexity.
- The importance-weighted error is the jackknife's over orders. By the Efron-Stein inequality it is
  on average at least the spread with one order less, so it tends to be too large.
{parts}"""
PARTS = """\
- The last row draws other windows, not other noise. Its error is `standard_error_of_split` in
  `evaluate.json`.
"""
ALPHA_0 = {"mdlm": 1.0, "bd3": 1.0, "eso_a": 0.5}
BATCH = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: `count` draws of noise, or orders, for each of `windows` windows."""

    objective: str
    alpha_0: float
    bound: str  # nelbo | importance_weighted
    count: int
    windows: int
    split: str = "test"


ORDERS = ((2, 8), (4, 8), (16, 4), (64, 2))  # K, windows
CASES = [Case("eso_b", 0.5, "importance_weighted", k, windows) for k, windows in ORDERS]
CASES += [Case("eso_b", 1.0, "importance_weighted", 8, 4)]
CASES += [Case("eso_b", 0.5, "nelbo", count, 8) for count in (1, 2)]
CASES += [Case("eso_b", 0.5, "nelbo", 8, 4), Case("eso_b", 0.5, "nelbo", 2, 8, "validation")]
CASES += [Case("eso_b", alpha_0, "nelbo", 2, 8) for alpha_0 in (1.0, 0.125)]
CASES += [Case(name, alpha_0, "nelbo", 2, 16) for name, alpha_0 in ALPHA_0.items()]
CASES += [Case("eso_b", 0.0, "nelbo", 1, 8)]


@dataclasses.dataclass(frozen=True)
class Model:
    config: object
    trained: restore.TrainedModel

    @classmethod
    def load(cls, workdir: pathlib.Path) -> "Model":
        config = checkpoint_meta.saved_config(workdir)
        with config.unlocked():
            config.eval.batch_size = BATCH
            config.data.dir = config.data.dir or str(workdir / "data")
        mesh = sharding.make_mesh(config.mesh)
        return cls(config, restore.load_trained(config, workdir, "ema", mesh))

    def batches(self, split: str, windows: int) -> list[dict]:
        manifest = load_data(self.config, pathlib.Path(self.config.data.dir).parent)
        mesh = self.trained.built.mesh
        return list(eval_batches(self.config, manifest, split, windows, mesh))

    def estimator(self, case: Case):
        """estimate(seed) → Estimate."""
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            config.alpha_0 = case.alpha_0
        batches = self.batches(case.split, case.windows)
        make, count = {
            "nelbo": (likelihood.make_nelbo, "num_samples"),
            "importance_weighted": (likelihood.make_importance_weighted, "num_orders"),
        }[case.bound]
        estimate = make(config, self.trained.built)
        settings = {count: case.count}
        return lambda seed: estimate(self.trained.params, batches, seed=seed, **settings)


def train_briefly(objective: str, data: str, workdir: pathlib.Path, steps: int) -> None:
    """A small model of the objective, on the quickstart's data and recipe."""
    if (workdir / checkpoint_steps.FOLDER).is_dir():
        return
    from configs import shakespeare

    config = shakespeare.get_config()
    with config.unlocked():
        config.objective, config.alpha_0 = objective, ALPHA_0[objective]
        config.data.dir = data
        config.model.width, config.model.blocks, config.model.unroll = 64, 2, 2
        config.train.steps = config.train.eval_every = config.train.checkpoint_every = steps
        config.train.eval_windows = BATCH
        config.optimizer.warmup_steps = min(100, steps // 2)
    config_lib.validate(config)
    train.main(config, workdir)


def summary(estimates: list) -> dict:
    """Compares the spread of estimates over seeds with their errors."""
    values = np.array([e.nll for e in estimates])
    errors = np.array([e.standard_error for e in estimates])
    spread = float(values.std(ddof=1))
    row = {
        "mean": float(values.mean()),
        "spread": spread,
        "error_samples": estimates[0].error_samples,
        "printed_rms": None,
        "printed_least": None,
        "printed_greatest": None,
        "printed_over_spread": None,
        "within_two_errors": None,
    }
    if np.isnan(errors).any():  # no error is printed
        return row
    row["printed_rms"] = math.sqrt(np.mean(errors**2))
    row["printed_least"], row["printed_greatest"] = float(errors.min()), float(errors.max())
    if spread > 1e-12:
        row["printed_over_spread"] = row["printed_rms"] / spread
        off = abs(values - values.mean()) * math.sqrt(len(values) / (len(values) - 1))
        row["within_two_errors"] = float(np.mean(off < 2 * errors))
    return row


def parts_of_a_split(whole, windows: int, parts: int) -> dict:
    """Compares Estimate.error_for with the spread over random parts of a split, with fixed draws
    for each window."""
    rng, estimates, total = np.random.default_rng(0), [], len(whole.window_nll)
    for _ in range(parts):
        chosen = rng.choice(total, windows, replace=False)
        nll, tokens = whole.window_nll[chosen], whole.window_tokens[chosen]
        count = int(tokens.sum())
        part = likelihood.Estimate(nll.sum() / count, 0.0, count, windows - 1, nll, tokens)
        estimates.append(dataclasses.replace(part, standard_error=part.error_for(total)))
    return summary(estimates)


def measure(workdir: pathlib.Path, others: pathlib.Path, steps: int, seeds: int, cases) -> dict:
    models, rows = {"eso_b": Model.load(workdir)}, []
    data = models["eso_b"].config.data.dir
    for case in cases:
        if case.objective not in models:
            train_briefly(case.objective, data, others / case.objective, steps)
            models[case.objective] = Model.load(others / case.objective)
        model = models[case.objective]
        estimate = model.estimator(case)
        found = summary([estimate(seed) for seed in range(seeds)])
        rows.append(dataclasses.asdict(case) | {"step": model.trained.step} | found)
        print({k: v for k, v in rows[-1].items() if v is not None}, flush=True)
    whole = models["eso_b"].estimator(Case("eso_b", 0.5, "nelbo", 2, 128))(0)
    part = parts_of_a_split(whole, 32, seeds)
    about = {"objective": "eso_b", "alpha_0": 0.5, "bound": "nelbo", "count": 2, "windows": 32}
    about |= {"split": "random parts of 128", "step": models["eso_b"].trained.step}
    rows.append(about | part)
    return {
        "seeds": seeds,
        "batch_size": BATCH,
        "commit": report_writer.commit(),
        "machine": machine.machine(),
        "rows": rows,
    }


def table(report: dict) -> str:
    def number(value, form=".4f"):
        return "–" if value is None else format(value, form)

    rows = []
    for r in report["rows"]:
        count = {"nelbo": "draws", "importance_weighted": "orders"}[r["bound"]]
        where = r["split"] if "random" in r["split"] else f"{r['windows']} of {r['split']}"
        cells = [r["objective"], f"{r['alpha_0']:g}", r["bound"].replace("_", "-")]
        cells += [f"{r['count']} {count}", where, r["error_samples"], f"{r['mean']:.4f}"]
        cells += [number(r["spread"]), number(r["printed_rms"])]
        cells += [number(r["printed_over_spread"], ".2f"), number(r["within_two_errors"], ".0%")]
        rows.append(cells)
    head = "model", "α₀", "bound", "each window", "windows", "differences", "nats per token"
    head += "spread", "printed error", "printed / spread", "within 2 errors"
    uncertain = 1 / math.sqrt(2 * (report["seeds"] - 1))
    m = report["machine"]
    where = m["cpu"] if m["device"] == "cpu" else m["device"]
    return NOTES.format(
        table=report_writer.table(head, rows),
        parts=PARTS if "random" in report["rows"][-1]["split"] else "",
        commit=report["commit"],
        machine=where,
        threads=m["threads"],
        jax=m["jax"],
        seeds=report["seeds"],
        batch_size=report["batch_size"],
        uncertain=f"{uncertain:.0%}",
        step=report["rows"][0]["step"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--others", type=pathlib.Path, default=pathlib.Path("runs/estimators"))
    parser.add_argument("--other_steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--only", default="", help="objectives, separated by commas; '' = all")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/estimators"))
    a = parser.parse_args()
    cases = [case for case in CASES if not a.only or case.objective in a.only.split(",")]
    report = measure(a.workdir, a.others, a.other_steps, a.seeds, cases)
    report_writer.write(a.out, report, table(report))


if __name__ == "__main__":
    main()
