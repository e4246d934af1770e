"""python -m benchmarks.train_speed [--published=DIR]: training speed of all objectives together.

Whole training steps (noise, forward, backward, clip, AdamW, EMA) on synthetic tokens, in tokens of
text per second. The objectives are interleaved, a burst of steps each, so that a drift of the
machine affects all of them; every other round runs in reverse order. With --published=DIR, a
checkout of the published PyTorch code (which needs torch and einops: --published_python), its steps
of the same shapes are interleaved with ours. Writes --out (.json) and the table (.md).

    python -m benchmarks.train_speed --preset=cpu      # two cores, a few minutes
    python -m benchmarks.train_speed --preset=small    # a GPU or a TPU
"""

import dataclasses
import os
import pathlib
import statistics
import sys
import time

import jax
import numpy as np
from absl import app, flags

from benchmarks import published_ratios, report_writer
from benchmarks.config_files import split_name
from benchmarks.machine import Load, machine, matmul_ceiling, num_threads, spread
from benchmarks.published_process import PublishedProcess, shapes
from esolm_jax import config as config_lib
from esolm_jax.aot import lower_bound
from esolm_jax.errors import UserError
from esolm_jax.model import build
from esolm_jax.parallel import sharding
from esolm_jax.training import train_step

OBJECTIVES = "ar mdlm bd3 eso_a:0.5 eso_b:1 eso_b:0.5 eso_b:0.125 eso_b:0".split()
PUBLISHED = ("ar", "mdlm", "eso_a", "eso_b")  # objectives of the published code

_PRESET = flags.DEFINE_enum("preset", "cpu", ["cpu", "small"], "Shapes.")
_OBJECTIVES = flags.DEFINE_list("objectives", OBJECTIVES, "Each is NAME or NAME:ALPHA_0.")
_OUT = flags.DEFINE_string("out", "docs/train_speed", "Without .md and .json.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Bursts of each objective.")
_STEPS = flags.DEFINE_integer("steps", 8, "Steps in a burst.")
_PUBLISHED = flags.DEFINE_string("published", "", "A checkout of the published code.")
_PYTHON = flags.DEFINE_string("published_python", sys.executable, "Python with torch and einops.")
_PATIENCE = flags.DEFINE_float(
    "patience", 0, "Seconds to wait in total for other processes to pause (Linux only)."
)
_THREADS = flags.DEFINE_integer("threads", 0, "CPU threads of either; 0 = all (Linux only).")
_BLOCKS = flags.DEFINE_integer("blocks", 0, "Instead of the preset's.")
_SEQ_LEN = flags.DEFINE_integer("seq_len", 0, "Instead of the preset's.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "Instead of the preset's.")
_MATMUL = flags.DEFINE_integer("matmul", 0, "Side of the ceiling's matrices; 0 = the preset's.")


@dataclasses.dataclass(frozen=True)
class Preset:
    """Shapes of a benchmark. vocab_size is without the mask token; matmul is the side of the
    square matrices whose product, in the compute dtype, measures peak FLOP/s."""

    fields: dict
    vocab_size: int
    matmul: int


PRESETS = {
    "cpu": Preset(
        {
            "model.width": 256,
            "model.blocks": 4,
            "model.heads": 8,
            "model.unroll": 4,
            "data.seq_len": 256,
            "train.batch_size": 8,
        },
        vocab_size=1024,
        matmul=1024,
    ),
    "small": Preset(
        {
            "model.width": 768,
            "model.blocks": 12,
            "model.heads": 12,
            "model.dtype": "bfloat16",
            "data.seq_len": 1024,
            "train.batch_size": 64,  # halved until the steps fit
        },
        vocab_size=50257,
        matmul=8192,
    ),
}


def make_config(preset: Preset, name: str, batch_size: int = 0):
    """The default config (dropout 0.1, AdamW, EMA) with the shapes of the preset; as published,
    AR has no adaLN."""
    config = config_lib.default_config()
    config.update_from_flattened_dict(preset.fields)
    config.objective, config.alpha_0 = split_name(name)
    if config.objective == "ar":
        config.model.cond_width = 0
    config.model.blocks = _BLOCKS.value or config.model.blocks
    config.model.unroll = min(config.model.unroll, config.model.blocks)
    config.data.seq_len = _SEQ_LEN.value or config.data.seq_len
    config.train.batch_size = batch_size or _BATCH_SIZE.value or config.train.batch_size
    config.mesh.devices = 1
    config_lib.validate(config)
    return config


class Ours:
    """One objective's step, compiled."""

    def __init__(self, preset: Preset, name: str, batch_size: int):
        self.name, self.config = name, make_config(preset, name, batch_size)
        size = preset.vocab_size
        tokenizer = {"vocab_size": size, "mask_id": size, "bos_id": 0}
        mesh = sharding.make_mesh(self.config.mesh)
        self.built = build.build_model(self.config, tokenizer, mesh)
        self.training = train_step.Trainer(self.config, self.built)
        begin = time.perf_counter()
        abstract = self.training.abstract_state(), self.training.abstract_batch()
        self.step = self.training.step_fn().lower(*abstract).compile()
        self.compile_seconds = time.perf_counter() - begin
        memory = self.step.memory_analysis()
        self.bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        shape = self.config.train.batch_size, self.config.data.seq_len
        x = np.random.default_rng(0).integers(size, size=shape, dtype=np.int32)
        batch = {"x": x, "valid": np.ones(shape, bool)}
        self.batch = sharding.put_batch(batch, mesh, shape[0])

    @property
    def state_key(self):
        """Objectives with the same parameters share one state in memory and train it one after
        another."""
        return self.config.model.cond_width

    def flops(self) -> float:
        """Lower bound of the FLOPs of a step (matrix products, forward and backward)."""
        work = lower_bound.step(self.config, self.training.phases)
        return sum(lower_bound.flops(self.built.model, work).values())

    def burst(self, states: dict, steps: int) -> float:
        """Seconds per step."""
        state = states.pop(self.state_key, None) or self.training.init()
        jax.block_until_ready(state)
        begin = time.perf_counter()
        for _ in range(steps):
            state, metrics = self.step(state, self.batch)
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - begin
        if not np.isfinite(metrics["loss"]):
            raise FloatingPointError(f"{self.name}: loss {metrics['loss']}")
        states[self.state_key] = state
        return seconds / steps


def compile_all(preset: Preset, names: list[str]) -> list[Ours]:
    """Every objective's step at the largest batch, a half, a quarter … of the preset's, at which
    all fit in the device's memory."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", float("inf"))
    batch_size = make_config(preset, names[0]).train.batch_size
    while True:
        ours = []
        for name in names:
            one = Ours(preset, name, batch_size)
            print(f"compiled {name} in {one.compile_seconds:.0f} s", flush=True)
            ours.append(one)
            if one.bytes > 0.85 * limit:
                break
        else:
            return ours
        batch_size //= 2
        print(f"{one.bytes / 2**30:.1f} GiB do not fit; batch size {batch_size}", flush=True)


class Published:
    """The process that runs steps of the published code on request (published_step.py)."""

    def __init__(self, config, vocab_size: int, names: list[str]):
        self.process = PublishedProcess(
            "published_step.py",
            _PUBLISHED.value,
            _PYTHON.value,
            {
                "threads": num_threads(),
                "shapes": shapes(config, vocab_size),
                "objectives": {name: split_name(name) for name in names},
            },
        )

    def burst(self, name: str, steps: int) -> tuple[float, float]:
        """Seconds per step, and total CPU seconds."""
        answer = self.process.ask({"name": name, "steps": steps})
        return answer["seconds"] / steps, answer["cpu_seconds"]


def turn(one: Ours, states: dict, published: Published | None, names: list[str], steps: int):
    """A burst of ours, then one of the published code's if it has this objective: (seconds a step
    of each, CPU seconds of the latter)."""
    taken, cpu = [one.burst(states, steps)], 0.0
    if one.name in names:
        seconds, cpu = published.burst(one.name, steps)
        taken.append(seconds)
    return taken, cpu


def measure(ours: list[Ours], published: Published | None, names: list[str], load: Load) -> dict:
    """{name: [rounds]}: (seconds a step of ours and of the published code, others' cores).

    A burst that other processes disturbed is repeated while the patience lasts.
    """
    found, states = {one.name: [] for one in ours}, {}
    for one in ours:  # the first steps are discarded
        turn(one, states, published, names, _STEPS.value)
    for index in range(_ROUNDS.value):
        for one in ours[:: -1 if index % 2 else 1]:
            while True:
                load.wait()
                taken, others = load.during(
                    lambda one=one: turn(one, states, published, names, _STEPS.value)
                )
                if not others > load.QUIET or load.patience <= 0:
                    break
            found[one.name].append((taken, others))
        said = {n: [round(s, 3) for s in bursts[-1][0]] for n, bursts in found.items()}
        print(f"round {index + 1}/{_ROUNDS.value}, seconds a step: {said}", flush=True)
    return found


def paired(a: list[float], b: list[float]) -> dict:
    """Spread of a/b, round by round."""
    return spread([x / y for x, y in zip(a, b, strict=True)])


def make_rows(ours: list[Ours], found: dict, ceiling: float) -> list[dict]:
    mine = {name: [taken[0] for taken, _ in bursts] for name, bursts in found.items()}
    theirs = {
        name: [taken[1] for taken, _ in bursts]
        for name, bursts in found.items()
        if len(bursts[0][0]) > 1
    }
    rows = []
    for one in ours:
        tokens = one.config.train.batch_size * one.config.data.seq_len
        taken = mine[one.name]
        row = {
            "name": one.name,
            "objective": one.config.objective,
            "alpha_0": one.config.alpha_0,
            "seconds_per_step": spread(taken),
            "tokens_per_second": spread([tokens / s for s in taken]),
            "flops_per_step": one.flops(),
            "mfu": one.flops() / statistics.median(taken) / ceiling,
            "step_bytes": one.bytes,
            "compile_seconds": one.compile_seconds,
            "cores_busy_with_others": spread([others for _, others in found[one.name]]),
        }
        if "mdlm" in mine:
            row["speed_relative_to_mdlm"] = paired(mine["mdlm"], taken)
        if one.name in theirs:
            row["published"] = {
                "seconds_per_step": spread(theirs[one.name]),
                "tokens_per_second": spread([tokens / s for s in theirs[one.name]]),
            }
            if "mdlm" in theirs:
                relative = paired(theirs["mdlm"], theirs[one.name])
                row["published"]["speed_relative_to_mdlm"] = relative
            row["speed_relative_to_published"] = paired(theirs[one.name], taken)
        rows.append(row)
    return rows


def command() -> str:
    """The command line, without this machine's paths."""
    args = []
    for arg in sys.argv[1:]:
        name, _, _ = arg.partition("=")
        args.append(
            {"--published": f"{name}=DIR", "--published_python": f"{name}=PYTHON"}.get(name, arg)
        )
    return " ".join(["python -m benchmarks.train_speed", *args])


def _range(figure: dict, form: str) -> str:
    low, high = format(figure["min"], form), format(figure["max"], form)
    return f"{figure['median']:{form}} ({low}–{high})"


def _over_published(row: dict) -> str:
    """The range over two machines, or over rounds for one."""
    ratio, others = row["speed_relative_to_published"], published_ratios.TRAINING.get(row["name"])
    return published_ratios.text(ratio["median"], others) if others else _range(ratio, ".2f")


def table(report: dict) -> str:
    """The rows as Markdown: medians over the rounds, least and greatest in brackets."""
    rows = report["rows"]
    has_published = report["published"] is not None
    head = ["objective", "α₀", "s/step", "tokens/s", "× mdlm", "MFU"]
    if has_published:
        head += ["published s/step", "published tokens/s", "× its mdlm", "ours / published"]
    lines = []
    for row in rows:
        cells = [
            row["objective"],
            f"{row['alpha_0']:g}",
            f"{row['seconds_per_step']['median']:.3f}",
            _range(row["tokens_per_second"], ".0f"),
            _range(row["speed_relative_to_mdlm"], ".2f")
            if "speed_relative_to_mdlm" in row
            else "–",
            f"{row['mfu']:.2f}",
        ]
        if "published" in row:
            theirs = row["published"]
            relative = theirs.get("speed_relative_to_mdlm")
            cells += [
                f"{theirs['seconds_per_step']['median']:.3f}",
                _range(theirs["tokens_per_second"], ".0f"),
                f"{relative['median']:.2f}" if relative else "–",
                _over_published(row),
            ]
        elif has_published:
            cells += ["–"] * 4
        lines.append(cells)
    title = "# Speed of training\n\nMade by `python -m benchmarks.train_speed`.\n\n"
    return f"{title}{report_writer.table(head, lines)}\n{_notes(report)}\n"


def _notes(report: dict) -> str:
    m, s = report["machine"], report["shapes"]
    where = m["cpu"] if m["device"] == "cpu" else m["device"]
    text = (
        f"Whole training steps: {s['width']} wide, {s['blocks']} blocks, {s['heads']} heads, "
        f"vocabulary {s['vocab_size']} with the mask, {s['batch_size']} × {s['length']} tokens, "
        f"{s['dtype']}, dropout {s['dropout']}. Median (least–greatest) of {report['rounds']} "
        f"interleaved bursts of {report['steps']} steps. MFU: lower-bound FLOPs against a matrix "
        f"product's {report['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s. {where}, "
        f"{m['threads']} CPU threads, jax {m['jax']}"
    )
    if report["published"]:
        text += f"; published code: torch {report['published']['torch']}, as many threads"
        text += f". {published_ratios.NOTE}"
    others = max(row["cores_busy_with_others"]["median"] for row in report["rows"])
    text = text.removesuffix(".")
    text += (
        f". Other processes kept at most {others:.2f} cores busy (the worst objective's median)."
    )
    return f"{text}\n\n    {report['command']}"


def run() -> dict:
    preset = PRESETS[_PRESET.value]
    names = _OBJECTIVES.value
    ours = compile_all(preset, names)
    device, config = jax.devices()[0], ours[0].config
    published = None
    measured = [n for n in names if split_name(n)[0] in PUBLISHED] if _PUBLISHED.value else []
    if measured:
        if device.platform != "cpu":
            raise UserError("--published: measured on CPUs only")
        published = Published(config, preset.vocab_size, measured)
    load = Load(_PATIENCE.value)
    found = measure(ours, published, measured, load)
    ceiling = matmul_ceiling(_MATMUL.value or preset.matmul, config.model.dtype, load)
    if published:
        published.process.close()
    shapes = {name: config.model[name] for name in ("width", "blocks", "heads", "dtype", "dropout")}
    return {
        "command": command(),
        "machine": machine(),
        "published": published and published.process.about,
        "preset": _PRESET.value,
        "shapes": shapes
        | {
            "length": config.data.seq_len,
            "batch_size": config.train.batch_size,
            "vocab_size": preset.vocab_size + 1,
        },
        "rounds": _ROUNDS.value,
        "steps": _STEPS.value,
        "matmul_flops_per_second": ceiling,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "rows": make_rows(ours, found, ceiling),
    }


def main(argv) -> None:
    del argv
    if _THREADS.value:  # before JAX and PyTorch count them
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _THREADS.value])
    report = run()
    report_writer.write(pathlib.Path(_OUT.value), report, table(report))


if __name__ == "__main__":
    app.run(main)
