"""python -m benchmarks.speculation --workdir=DIR: what lossless speculation gains.

Texts of the Eso-LM (B) in DIR, such as the quickstart's, one token a pass and by speculation, from
the same distribution, over k, α₀ and both ways to draft. Tokens per pass and seconds, side by side
in one run; compile time is left out. Writes docs/speculation.{json,md}.

What a wider pass costs depends on the size of the model: docs/speculation_wide.* (--out) is of one
trained on the quickstart's data, with --config.model.width=512 --config.model.blocks=6
--config.model.heads=8 --config.optimizer.learning_rate=1e-3 for 600 steps, then for up to 1300.
"""

import argparse
import functools
import pathlib

import numpy as np

from benchmarks import interleaved_timings, report_writer
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine.network import fold
from esolm_jax.sampling.generate import Generator, draft_figures
from esolm_jax.sampling.plan.canvas import Canvas
from esolm_jax.training import checkpoint_meta, restore

ALPHAS = (0.0, 0.125, 0.5, 1.0)
WAYS = [("plain", 0, False)]
WAYS += [(style, k, False) for style in ("chain", "staircase") for k in (2, 3, 4)]
WAYS += [("chain", k, False) for k in (6, 8, 12)] + [("chain", 12, True)]


def timed(generators: list[Generator], network, repeats: int) -> list[dict]:
    """Median seconds of interleaved runs, passes and acceptance, of each generator."""
    runs = [functools.partial(generator.compile(network), network) for generator in generators]
    return [
        _row(*each)
        for each in zip(generators, *interleaved_timings.timed(runs, repeats), strict=True)
    ]


def _row(generator: Generator, seconds: float, decoded) -> dict:
    nfe, drafts = generator.nfe(decoded), draft_figures(decoded)
    proposed, accepted = (np.array(drafts.get(name, [])) for name in ("proposed", "accepted"))
    return {
        "seconds": seconds,
        "nfe": nfe,
        "tokens_per_pass": int(generator.schedule.length.max()) / nfe,
        "acceptance": (accepted / np.maximum(proposed, 1)).tolist(),
    }


def measure(workdir: pathlib.Path, num: int, repeats: int) -> dict:
    config = checkpoint_meta.saved_config(workdir)
    with config.unlocked():
        config.sample.num_texts, config.sample.top_p = num, 1.0
    mesh = sharding.make_mesh(config.mesh)
    trained = restore.load_trained(config, workdir, "ema", mesh)
    network = fold(trained.built.model, trained.params, mesh)
    rows = []
    for alpha_0 in ALPHAS:
        generators = []
        for style, k, adaptive in WAYS:
            with config.unlocked():
                config.alpha_0, config.sample.draft_tokens = alpha_0, k
                config.sample.draft_adaptive = adaptive
                config.sample.draft_style = "chain" if style == "plain" else style
            canvas = Canvas.empty(num, config.data.seq_len)
            special = trained.built.special
            resolved = config.copy_and_resolve_references()
            generators.append(Generator.of(resolved, canvas, special, mesh=mesh))
        found = timed(generators, network, repeats)
        for (style, k, adaptive), row in zip(WAYS, found, strict=True):
            row |= {"alpha_0": alpha_0, "style": style, "k": k, "adaptive": adaptive}
            rows.append(row | {"speedup": found[0]["seconds"] / row["seconds"]})
            print({name: row[name] for name in ("alpha_0", "style", "k", "seconds", "nfe")})
    shape = {name: config.model[name] for name in ("width", "blocks")}
    length = config.data.seq_len
    return shape | {"length": length, "batch": num, "step": trained.step, "rows": rows}


def table(found: dict) -> str:
    text = "# Lossless speculation on a trained model\n\n"
    text += f"Made by `python -m benchmarks.speculation`: a model {found['width']} wide, of "
    text += f"{found['blocks']} blocks and {found['step']} steps, {found['batch']} text(s) of "
    text += f"{found['length']} tokens, temperature 1, compared with one token per pass. "
    text += "Medians of interleaved runs. Acceptance is by the distance of a draft from the last "
    text += "final token.\n\n"
    head = "α₀", "drafts", "k", "tokens per pass", "seconds", "speed-up", "acceptance"
    rows = []
    for row in found["rows"]:
        k = f"≤ {row['k']}" if row["adaptive"] else row["k"] or "–"
        rates = " ".join(f"{rate:.2f}" for rate in row["acceptance"][:7])
        cells = [f"{row['alpha_0']:g}", row["style"], k, f"{row['tokens_per_pass']:.2f}"]
        rows.append([*cells, f"{row['seconds']:.3f}", f"{row['speedup']:.2f}", rates])
    return text + report_writer.table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--num", type=int, default=1, help="texts in a batch")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/speculation"))
    arguments = parser.parse_args()
    found = measure(arguments.workdir, arguments.num, arguments.repeats)
    report_writer.write(arguments.out, found, table(found))


if __name__ == "__main__":
    main()
