"""python -m benchmarks.evaluate_speed: windows per second of evaluate and of a forward pass of
training.

The forward pass of training is the loss of a batch without gradients, with noise, trimmed as a step
trims it. Evaluation sends each window through all phases of its objective, training through one; so
each phase of the forward pass has as many rows here as evaluation has windows. Both are interleaved
in one process, on batches that are in memory: whole loops of `evaluate` (one draw of noise), of
`evaluate --suite` and of `evaluate --report`. Writes docs/evaluate_speed.{json,md}.
"""

import argparse
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import config_files, interleaved_timings, report_writer
from configs import shakespeare
from esolm_jax import config as config_lib
from esolm_jax.evaluation import likelihood, window_noise
from esolm_jax.evaluation.report import window_sums
from esolm_jax.family import trim
from esolm_jax.model import build
from esolm_jax.parallel import sharding
from esolm_jax.process import prng
from esolm_jax.training import phase_loss, train_step

OBJECTIVES = "eso_b:0.5,mdlm,ar"
TARGET = 0.9  # of the forward pass of training

NOTES = """# Speed of evaluation

Made by `python -m benchmarks.evaluate_speed`. Windows per second of the loop of `evaluate` (one
draw of noise per window), and of the forward pass of training: the loss of a batch, without
gradients. The target of the project is {target} of the latter.

{table}
The model of `configs/shakespeare.py` with random weights: windows of {length} tokens, {rows} in a
batch, {batches} batches in memory. Medians of {repeats} interleaved rounds with other noise, in
windows per second; ratios are the medians of the rounds' ratios to the forward pass. `--suite`,
`--report`: the loops of `evaluate` with these flags.

Evaluation sends each window through all phases of the objective, training through one. So a forward
pass has {rows} rows of each phase here, and both run equal numbers of tokens. Both drop query
copies that reach no loss, except in a batch with too many predicted tokens.{note}
"""


def make_config(name: str, rows: int):
    """The quickstart's config with another objective, on one device; `rows` of each phase."""
    config = shakespeare.get_config()
    config.objective, config.alpha_0 = config_files.split_name(name)
    config.mesh.devices = 1
    config.eval.batch_size = rows
    phases = 2 if 0 < config.alpha_0 < 1 else 1
    config.train.batch_size = phases * rows
    config_lib.validate(config)
    return config


def forward_pass(training: train_step.Trainer, copies: int):
    """(params, key, x, valid, before) → the losses of all phases, each of all rows. It waits for
    `before`, an earlier result, as a training step waits for the one before."""
    objective, phases = training.objective, training.phases

    @jax.jit
    def forward(params, key, x, valid, before):
        params, _ = jax.lax.optimization_barrier((params, before))
        rows = [jnp.concatenate([a] * copies) for a in (x, valid)]
        labelled = phase_loss.label_batch(phases, key, *rows)
        tokens = [jnp.sum(part.num_tokens) for part in labelled]
        pairs = list(zip(labelled, objective.queries, strict=True))
        fits = [trim.fits(part, queries) for part, queries in pairs if queries]
        if not fits:
            return objective.losses(params, labelled, tokens)
        short = tuple(trim.trim(part, queries) if queries else part for part, queries in pairs)
        return jax.lax.cond(
            jnp.all(jnp.stack(fits)),
            lambda: objective.losses(params, short, tokens),
            lambda: objective.losses(params, labelled, tokens),
        )

    return forward


def loops(name: str, rows: int, batches: int) -> dict:
    """The loops over all batches, by name: seed → results."""
    config = make_config(name, rows)
    size = config.data.vocab_size
    tokenizer = {"vocab_size": size, "mask_id": size, "bos_id": 0}
    mesh = sharding.make_mesh(config.mesh)
    built = build.build_model(config, tokenizer, mesh)
    training = train_step.Trainer(config, built)
    params = training.init().params
    x = np.random.default_rng(0).integers(size, size=(batches, rows, config.data.seq_len))
    valid = np.ones(x.shape[1:], bool)
    data = [
        sharding.put_batch({"x": one.astype(np.int32), "valid": valid}, mesh, rows) for one in x
    ]
    forward = forward_pass(training, config.train.batch_size // rows)

    def train_loop(seed: int):
        keys = jax.random.split(prng.key(seed), batches)
        losses = [jnp.zeros(len(training.phases))]
        for key, batch in zip(keys, data, strict=True):
            losses.append(forward(params, key, batch["x"], batch["valid"], losses[-1]))
        return losses[1:]

    evaluate = likelihood.make_nelbo(config, built)
    suite = window_noise.make_nelbo(config, built)
    report = functools.partial(window_sums.make(config, built), windows=rows * batches)
    others = {"evaluate": evaluate, "suite": suite, "report": report}
    return {"training": train_loop} | {
        name: lambda seed, run=run: run(params, data, num_samples=1, seed=seed)
        for name, run in others.items()
    }


def measure(name: str, a: argparse.Namespace) -> dict:
    calls = loops(name, a.rows, a.batches)
    for call in calls.values():  # compiles
        jax.block_until_ready(call(0))
    rounds = []
    for seed in range(a.repeats):
        seeded = [functools.partial(call, seed) for call in calls.values()]
        seconds, found = interleaved_timings.timed(seeded, 1)
        rounds.append([a.rows * a.batches / s for s in seconds])
    speed = np.array(rounds)
    medians, ratios = np.median(speed, axis=0), np.median(speed / speed[:, :1], axis=0)
    row = {f"{one}_windows_per_second": float(v) for one, v in zip(calls, medians, strict=True)}
    row |= {f"{one}_ratio": float(v) for one, v in zip(calls, ratios, strict=True)}
    row["training_nll"] = float(np.mean([np.sum(losses) for losses in found[0]]))
    row["evaluate_nll"] = float(found[1].nll)
    print({key: round(value, 3) for key, value in row.items()}, flush=True)
    return {"objective": name} | row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objectives", default=OBJECTIVES, help="NAME or NAME:ALPHA_0, by commas")
    parser.add_argument("--rows", type=int, default=64, help="windows of a batch")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--note", default="", help="a sentence for the page, on the machine's load")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/evaluate_speed"))
    a = parser.parse_args()
    rows = [measure(name, a) for name in a.objectives.split(",")]
    head = "objective", "training", "evaluate", "ratio", "--suite", "ratio", "--report", "ratio"
    lines = []
    for row in rows:
        cells = [row["objective"], f"{row['training_windows_per_second']:.1f}"]
        for name in ("evaluate", "suite", "report"):
            cells += [f"{row[f'{name}_windows_per_second']:.1f}", f"{row[f'{name}_ratio']:.2f}"]
        lines.append(cells)
    text = NOTES.format(
        target=TARGET,
        table=report_writer.table(head, lines),
        length=shakespeare.get_config().data.seq_len,
        rows=a.rows,
        batches=a.batches,
        repeats=a.repeats,
        note=f" {a.note}" if a.note else "",
    )
    report_writer.write(a.out, {"rows": rows, "settings": vars(a) | {"out": str(a.out)}}, text)


if __name__ == "__main__":
    main()
