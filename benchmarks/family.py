"""python -m benchmarks.family [--out=docs]: trains and evaluates all families with the same
settings.

Trains ar, mdlm, bd3, eso_a and eso_b on Shakespeare with the same model, optimizer and number of
tokens, evaluates each on the held-out test plays, and writes family.json, family.png and
family.md (the table) to --out. About an hour on two CPU cores. Runs that are finished are
evaluated again but not trained again; interrupted runs resume.
"""

import functools
import json
import pathlib

from absl import app, flags, logging

from benchmarks import report_writer
from configs.shakespeare import get_config
from esolm_jax import config as config_lib
from esolm_jax import evaluate, prepare, results, train
from esolm_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", "runs/family", "Folder of the runs.")
_OUT = flags.DEFINE_string("out", "docs", "Where the table and the plot go.")
_STEPS = flags.DEFINE_integer("steps", 1000, "Training steps of each run.")

# (objective, alpha_0), as in the paper's tables
RUNS = (
    ("ar", 0.0),
    ("mdlm", 1.0),
    ("bd3", 1.0),
    ("eso_a", 1.0),
    ("eso_a", 0.5),
    ("eso_b", 1.0),
    ("eso_b", 0.5),
    ("eso_b", 0.125),
    ("eso_b", 0.0),
)


def run_config(objective: str, alpha_0: float, workdir: pathlib.Path):
    """The quickstart's config with another objective; the only other
    difference is that AR has no adaLN, as published."""
    config = get_config()
    with config.unlocked():
        config.objective, config.alpha_0 = objective, alpha_0
        config.data.dir = str(workdir / "data")
        config.train.steps = _STEPS.value
        config.eval.num_samples = 8
        config.eval.num_orders = 16 if objective == "eso_b" and alpha_0 > 0 else 0
        if objective == "ar":
            config.model.cond_width = 0
    config_lib.validate(config)
    return config


def name_of(objective: str, alpha_0: float) -> str:
    return objective if objective in ("ar", "mdlm", "bd3") else f"{objective}_{alpha_0:g}"


def trained(objective: str, alpha_0: float, workdir: pathlib.Path, seed: int = 0):
    """(config, folder) of a family, trained if it is not yet."""
    config = run_config(objective, alpha_0, workdir)
    name = name_of(objective, alpha_0)
    if seed:
        name = f"{name}_seed{seed}"
        with config.unlocked():
            config.seed = seed
    folder = workdir / name
    saved = folder / "config.json"
    if saved.exists() and json.loads(saved.read_text())["train"]["steps"] != config.train.steps:
        raise UserError(f"--workdir={workdir}: {name} was trained for another number of --steps")
    train.main(config, folder)  # resumes; does nothing if the run is complete
    return config, folder


def run(objective: str, alpha_0: float, workdir: pathlib.Path) -> dict:
    """Trains and evaluates one family; returns its row of the table."""
    config, folder = trained(objective, alpha_0, workdir)
    figures = evaluate.evaluate(config, folder)
    results.write_json(folder / "evaluate.json", figures)
    bounds = {r["bound"]: r for r in figures["results"]}
    first = figures["results"][0]
    row = {
        "name": folder.name,
        "objective": objective,
        "alpha_0": alpha_0,
        "exact": first["bound"] == "exact",
        "perplexity": first["perplexity"],
        "standard_error_nats": first["standard_error"],
        "bits_per_byte": first["bits_per_byte"],
        "importance_weighted_perplexity": None,
        "num_orders": None,
        "unigram_perplexity": figures["unigram_perplexity"],
        "test_tokens": figures["num_tokens"],
        "training_tokens": figures["step"] * config.train.batch_size * config.data.seq_len,
    }
    if weighted := bounds.get("importance_weighted"):
        row["importance_weighted_perplexity"] = weighted["perplexity"]
        row["num_orders"] = weighted["num_orders"]
    return row


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    head = "model", "α₀", "perplexity (NELBO)", "MC error, nats", "importance-weighted", "bits/byte"
    lines = []
    for row in rows:
        weighted = row["importance_weighted_perplexity"]
        weighted = f"{weighted:.2f} (K = {row['num_orders']})" if weighted else "–"
        exact = " (exact)" if row["exact"] else ""
        cells = [row["objective"], f"{row['alpha_0']:g}", f"{row['perplexity']:.2f}{exact}"]
        cells += [f"{row['standard_error_nats']:.4f}", weighted, f"{row['bits_per_byte']:.3f}"]
        lines.append(cells)
    title = "# All families with the same settings\n\nMade by `python -m benchmarks.family`.\n\n"
    return title + report_writer.table(head, lines)


def plot(rows: list[dict], path: pathlib.Path) -> None:
    """Perplexity against α₀: Eso-LM as curves, the baselines as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")

    def curve(objective, key, label, **style):
        mine = [r for r in rows if r["objective"] == objective and r[key]]
        points = sorted((r["alpha_0"], r[key]) for r in mine)
        axes.plot(*zip(*points, strict=True), label=label, **style)

    curve("eso_b", "perplexity", "Eso-LM (B), NELBO", color="C0", marker="o")
    curve(
        "eso_b",
        "importance_weighted_perplexity",
        "Eso-LM (B), importance-weighted",
        color="C0",
        marker="o",
        linestyle=":",
    )
    curve("eso_a", "perplexity", "Eso-LM (A), NELBO", color="C1", marker="s")
    labels = {"ar": "AR (exact)", "mdlm": "MDLM", "bd3": "BD3-LM, block length 4"}
    for (objective, label), color in zip(labels.items(), ("C2", "C3", "C4"), strict=True):
        value = next(r["perplexity"] for r in rows if r["objective"] == objective)
        axes.axhline(value, color=color, linestyle="--", linewidth=1, label=label)
    tokens, unigram = rows[0]["training_tokens"], rows[0]["unigram_perplexity"]
    axes.set(
        xlabel="α₀: fraction of tokens generated by diffusion",
        ylabel="test perplexity (upper bound)",
        title=f"Shakespeare, {tokens / 1e6:.1f} M training tokens each (unigram: {unigram:.0f})",
    )
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main(argv) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)
    workdir, out = pathlib.Path(_WORKDIR.value), pathlib.Path(_OUT.value)
    prepare.main(run_config(*RUNS[0], workdir), workdir)
    rows = []
    for i, (objective, alpha_0) in enumerate(RUNS, 1):
        print(f"[{i}/{len(RUNS)}] {objective}, alpha_0 = {alpha_0}", flush=True)
        rows.append(run(objective, alpha_0, workdir))
    report_writer.write(out / "family", rows, table(rows), functools.partial(plot, rows))


if __name__ == "__main__":
    app.run(main)
