"""python -m benchmarks.frontier [--workdir=runs/family --out=docs]: quality of texts against time.

Models of benchmarks.family, trained if necessary, generate texts with different numbers of passes.
Quality is the perplexity of the texts under an AR model trained with another seed, and the entropy
of a text's tokens: texts that repeat themselves have a low perplexity and a low entropy. Writes
frontier.json, frontier.md and frontier.png to --out.
"""

import functools
import math
import pathlib
import statistics
import time

import jax
import numpy as np
from absl import app, flags, logging

from benchmarks import family, report_writer
from esolm_jax import prepare
from esolm_jax.data.manifest import load_manifest
from esolm_jax.evaluation import protocol
from esolm_jax.evaluation.batches import eval_batches
from esolm_jax.evaluation.protocol import Judge
from esolm_jax.evaluation.quality.perplexity import text_nll
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine.network import fold
from esolm_jax.sampling.generate import Generator
from esolm_jax.sampling.plan.canvas import Canvas
from esolm_jax.training import restore

_ONLY = flags.DEFINE_list("only", [], "Only these models, such as eso_b_0.5; none = all.")
_TEXTS = flags.DEFINE_integer("texts", 64, "How many each point is of, in one batch.")
JUDGE_SEED = 1
STEPS = (8, 16, 32, 64, 0)  # of the diffusion phase; 0 = one token a pass
MODELS = (("ar", 0.0), ("mdlm", 1.0), ("bd3", 1.0), *(("eso_b", a) for a in (1.0, 0.5, 0.125)))
SPECULATED = 4
REPEATS = 3


def read_judge(workdir: pathlib.Path) -> Judge:
    """An AR model trained with another seed, which scores whole texts."""
    config, folder = family.trained("ar", 0.0, workdir, seed=JUDGE_SEED)
    return Judge(folder, mesh=sharding.make_mesh(config.mesh))


def quality(text_BL: np.ndarray, judge: Judge) -> dict[str, float]:
    """Perplexity per token of whole texts, and the mean entropy of a text's tokens, in nats."""
    nll, count = text_nll(judge, text_BL.tolist())
    mean_entropy = float(protocol.entropy(text_BL).mean())
    return {"perplexity": math.exp(nll.sum() / count.sum()), "entropy": mean_entropy}


def point(generator: Generator, network, judge: Judge) -> dict:
    """Generates the texts several times and scores them."""
    run = generator.compile(network)
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        decoded = run(network)
        jax.block_until_ready(decoded)
        seconds.append(time.perf_counter() - begin)
    text = np.asarray(decoded.text)
    return {
        "nfe": generator.nfe(decoded),
        "seconds_per_text": statistics.median(seconds) / len(text),
        **quality(text, judge),
    }


def frontier(objective: str, alpha_0: float, judge: Judge, workdir: pathlib.Path) -> dict:
    """The points of one model by name."""
    config, folder = family.trained(objective, alpha_0, workdir)
    mesh = sharding.make_mesh(config.mesh)
    trained = restore.load_trained(config, folder, "ema", mesh)
    network = fold(trained.built.model, trained.params, mesh)
    ways = [{"steps": n} for n in (STEPS if objective != "ar" else (0,))]
    if objective == "eso_b":
        ways.append({"steps": 0, "draft_tokens": SPECULATED})
    found = {}
    for way in ways:
        with config.unlocked():
            config.sample.top_p, config.sample.draft_tokens = 1.0, 0
            config.sample.update(way)
        canvas = Canvas.empty(_TEXTS.value, config.data.seq_len)
        name = f"T = {way['steps'] or 'L'}" + (f", k = {SPECULATED}" if len(way) > 1 else "")
        found[name] = point(Generator.of(config, canvas, trained.built.special), network, judge)
        print(f"{folder.name}, {name}: {found[name]}", flush=True)
    return found


def held_out(config, judge: Judge) -> dict:
    """The same figures for the same number of test windows."""
    manifest = load_manifest(config.data.dir)
    mesh = sharding.make_mesh(config.mesh)
    batches = eval_batches(config, manifest, "test", _TEXTS.value, mesh)
    rows = [(np.asarray(batch["x"]), np.asarray(batch["valid"])) for batch in batches]
    text, valid = (np.concatenate(part) for part in zip(*rows, strict=True))
    return quality(text[valid.all(axis=1)], judge)


def table(report: dict) -> str:
    rows = []
    for model, points in report["models"].items():
        for name, p in points.items():
            cells = [model, name, p["nfe"], f"{1e3 * p['seconds_per_text']:.1f}"]
            rows.append([*cells, f"{p['perplexity']:.1f}", f"{p['entropy']:.2f}"])
    real = report["held_out"]
    rows.append(["test windows", *"–––", f"{real['perplexity']:.1f}", f"{real['entropy']:.2f}"])
    head = "model", "passes", "NFE", "ms a text", "perplexity", "entropy, nats"
    return (
        f"{_summary(report)}\n{report_writer.table(head, rows)}\n"
        f"{report['texts']} texts of {report['length']} tokens each, in one batch, temperature 1, "
        "without compilation. Perplexity is that of an AR model trained with another seed. T: "
        "steps "
        f"of the diffusion phase; k: drafts of speculation. Device: {report['device']}.\n"
    )


def _summary(report: dict) -> str:
    """The title of the page, and AR compared with the other models."""
    text = "# Quality of texts against time\n\nMade by `python -m benchmarks.frontier`.\n"
    ar = report["models"].get("ar", {}).get("T = L")
    others = [
        (p["perplexity"], f"{model}, {name}", p["seconds_per_text"])
        for model, points in report["models"].items()
        for name, p in points.items()
        if model != "ar"
    ]
    if ar and others:
        perplexity, name, seconds = min(others)
        ahead = perplexity > ar["perplexity"] and seconds > ar["seconds_per_text"]
        text += "\nAt this toy scale AR is ahead: " if ahead else "\nAR against the best other: "
        text += (
            f"perplexity {ar['perplexity']:.1f} in {1e3 * ar['seconds_per_text']:.1f} ms a text. "
            f"The best of the others ({name}) has {perplexity:.1f} in {1e3 * seconds:.1f} ms.\n"
        )
    return text


def plot(report: dict, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key in zip(axes, ("perplexity", "entropy"), strict=True):
        for i, (model, points) in enumerate(report["models"].items()):
            plain = sorted(
                (1e3 * p["seconds_per_text"], p[key]) for n, p in points.items() if "k =" not in n
            )
            axis.plot(*zip(*plain, strict=True), "o-", color=f"C{i}", label=model)
            for name, p in points.items():
                if "k =" in name:
                    axis.plot(1e3 * p["seconds_per_text"], p[key], "*", color=f"C{i}", ms=12)
        axis.axhline(report["held_out"][key], color="0.4", linestyle=":", label="test windows")
        axis.set(xscale="log", xlabel="ms a text")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
        axis.xaxis.set_minor_formatter("{x:g}")
    axes[0].set(ylabel="perplexity under an AR model", yscale="log")
    axes[1].set(ylabel="entropy of a text's tokens, nats")
    axes[0].legend(fontsize=8, title="stars: by speculation")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)
    workdir, out = pathlib.Path(flags.FLAGS.workdir), pathlib.Path(flags.FLAGS.out)
    config = family.run_config("ar", 0.0, workdir)
    prepare.main(config, workdir)
    judge = read_judge(workdir)
    report = {
        "texts": _TEXTS.value,
        "length": config.data.seq_len,
        "device": jax.devices()[0].device_kind,
        "held_out": held_out(config, judge),
        "models": {},
    }
    for objective, alpha_0 in MODELS:
        name = family.name_of(objective, alpha_0)
        if not _ONLY.value or name in _ONLY.value:
            report["models"][name] = frontier(objective, alpha_0, judge, workdir)
    report_writer.write(out / "frontier", report, table(report), functools.partial(plot, report))


if __name__ == "__main__":
    app.run(main)
