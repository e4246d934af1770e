"""python -m benchmarks.anneal [--out=docs]: an Eso-LM from a pretrained AR model, and from scratch.

1. Trains an autoregressive Llama-style model on the plays of Shakespeare and writes it as a Llama
   of the Hugging Face hub; this is the pretrained model.
2. Converts it and anneals it from alpha_0 = 0 to 0.5.
3. Trains the same model from random weights on the same number of tokens, at alpha_0 = 0.5.

Writes anneal.json, anneal.md (the table) and anneal.png (the curves) to --out. About 20 minutes on
two CPU cores. Finished runs are not repeated.
"""

import functools
import pathlib

from absl import app, flags, logging

from benchmarks import report_writer
from configs import shakespeare
from esolm_jax import config as config_lib
from esolm_jax import evaluate, prepare, train
from esolm_jax.data.manifest import load_manifest
from esolm_jax.data.reader import unigram_perplexity
from esolm_jax.interop.hub import config as hub_config
from esolm_jax.interop.hub import from_hub, to_hub
from esolm_jax.training import metrics

_WORKDIR = flags.DEFINE_string("workdir", "runs/anneal", "Folder of the runs.")
_OUT = flags.DEFINE_string("out", "docs", "Where the table and the plot go.")
_AR_STEPS = flags.DEFINE_integer("ar_steps", 1000, "Training steps of the AR model.")
_STEPS = flags.DEFINE_integer("steps", 400, "Training steps of each Eso-LM.")

ALPHA_0 = 0.5
# Random weights need the larger rate; fine-tuning with it would forget more.
RATES = {"scratch": 2e-3, "annealed": 1e-3, "fine-tuned": 1e-3}
LABELS = {
    "scratch": "from random weights",
    "fine-tuned": "from the AR model, alpha_0 = 0.5 from the start",
    "annealed": "from the AR model, alpha_0 annealed",
}


def ar_config(workdir: pathlib.Path):
    """The quickstart's sizes in a Llama-style block, autoregressive."""
    config = shakespeare.get_config()
    with config.unlocked():
        config.objective, config.alpha_0 = "ar", 0.0
        config.model.style, config.model.cond_width = "llama", 0
        config.model.kv_heads, config.model.mlp_width = 2, 344  # same size as 4 x width with GELU
        config.data.dir = str(workdir / "ar_data")
        config.train.steps = _AR_STEPS.value
    config_lib.validate(config)
    return config


def convert(workdir: pathlib.Path) -> pathlib.Path:
    """The AR model → a folder of the hub → a workdir, as for a downloaded model."""
    folder, converted = workdir / "llama", workdir / "converted"
    if not folder.exists():
        to_hub.convert(ar_config(workdir), workdir / "ar", folder, "ema")
    if not converted.exists():
        config = hub_config.get_config(str(folder))
        from_hub.convert(config, str(folder), converted, "")
    return converted


def eso_config(name: str, workdir: pathlib.Path, converted: pathlib.Path):
    """An Eso-LM (B) with the converted model's sizes and tokenizer."""
    config, model = shakespeare.get_config(), hub_config.get_config(str(workdir / "llama")).model
    with config.unlocked():
        config.objective, config.alpha_0 = "eso_b", ALPHA_0
        config.model = model
        config.model.unroll = 4
        config.data.tokenizer_path = str(converted.resolve() / "tokenizer" / "tokenizer.model")
        config.data.dir = str(workdir / "data")
        config.optimizer.learning_rate = RATES[name]
        config.optimizer.warmup_steps = 50
        config.train.steps = _STEPS.value
        config.train.eval_every = 50
        config.train.eval_windows = 128
        config.eval.num_samples = 4
        if name != "scratch":
            config.init_from = str(converted)
        if name == "annealed":
            config.train.anneal_steps = _STEPS.value // 2
    config_lib.validate(config)
    return config


def run(name: str, config, workdir: pathlib.Path) -> dict:
    """Trains and evaluates a run; returns its row of the table."""
    folder = workdir / name
    train.main(config, folder)  # resumes; does nothing if the run is complete
    figures = evaluate.evaluate(config, folder)
    bound = figures["results"][0]
    curve = [e for e in metrics.read(folder) if "validation_nelbo" in e]
    return {
        "name": name,
        "alpha_0": config.alpha_0,
        "learning_rate": config.optimizer.learning_rate,
        "anneal_steps": config.train.anneal_steps,
        "training_tokens": figures["step"] * config.train.batch_size * config.data.seq_len,
        "nelbo": bound["nll_per_token"],
        "standard_error": bound["standard_error"],
        "perplexity": bound["perplexity"],
        "bits_per_byte": bound["bits_per_byte"],
        "validation": {str(e["step"]): e["validation_nelbo"] for e in curve},
    }


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    head = "model", "α₀", "training tokens", "NELBO, nats per token", "perplexity", "bits/byte"
    lines = []
    for row in rows:
        error = f" ± {row['standard_error']:.4f}" if row["standard_error"] else " (exact)"
        label = LABELS.get(row["name"], "the AR model").replace("alpha_0", "α₀")
        cells = [label, f"{row['alpha_0']:g}", f"{row['training_tokens'] / 1e6:.2f} M"]
        cells += [f"{row['nelbo']:.3f}{error}", f"{row['perplexity']:.1f}"]
        lines.append([*cells, f"{row['bits_per_byte']:.3f}"])
    note = (
        "Test split: plays of Shakespeare. Training tokens exclude those of the AR model. AdamW, "
        f"with a cosine schedule from {RATES['scratch']:g} (random weights and AR) or "
        f"{RATES['annealed']:g}. α₀ is annealed over the first half of the steps. One seed."
    )
    title = (
        "# From a pretrained AR model to an Eso-LM\n\nMade by `python -m benchmarks.anneal`.\n\n"
    )
    return f"{title}{report_writer.table(head, lines)}\n{note}\n"


def plot(rows: list[dict], unigram: float, path: pathlib.Path) -> None:
    """Validation perplexity of the Eso-LMs against training tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for row in rows[1:]:
        steps = np.array([int(step) for step in row["validation"]])
        tokens = steps * row["training_tokens"] / steps[-1]
        label = LABELS[row["name"]].replace("alpha_0", "α₀")
        nats = np.array(list(row["validation"].values()))
        axes.plot(tokens / 1e6, np.exp(nats), marker="o", markersize=4, label=label)
    axes.axhline(unigram, color="0.6", linestyle="--", linewidth=1, label="unigram model")
    axes.axhline(
        rows[0]["perplexity"], color="k", linestyle=":", linewidth=1, label="the AR model (test)"
    )
    axes.set(
        yscale="log",
        xlabel="million training tokens",
        ylabel=f"validation perplexity (NELBO, α₀ = {ALPHA_0})",
        title="Shakespeare: an Eso-LM from a pretrained AR model",
    )
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main(argv) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)
    workdir, out = pathlib.Path(_WORKDIR.value), pathlib.Path(_OUT.value)
    ar = ar_config(workdir)
    prepare.main(ar, workdir)
    rows = [run("ar", ar, workdir)]
    converted = convert(workdir)
    prepare.main(eso_config("scratch", workdir, converted), workdir)
    for name in LABELS:
        print(f"== {LABELS[name]}", flush=True)
        rows.append(run(name, eso_config(name, workdir, converted), workdir))
    unigram = unigram_perplexity(load_manifest(workdir / "data"), "validation")
    figures = {"runs": rows, "unigram_perplexity": unigram}
    draw = functools.partial(plot, rows, unigram)
    report_writer.write(out / "anneal", figures, table(rows), draw)


if __name__ == "__main__":
    app.run(main)
