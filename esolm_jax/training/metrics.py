"""Metrics of a training run: JSONL and TensorBoard files, a progress bar, the learning curve."""

import math
import os
import pathlib
import sys

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from esolm_jax import results
from esolm_jax.training import metrics_file, speed

FILE = "metrics.jsonl"


def read(workdir: pathlib.Path) -> list[dict]:
    """The entries of WORKDIR/metrics.jsonl, in order of step; damaged lines are left out."""
    return metrics_file.read(workdir / FILE).entries


class Metrics:
    """Writes metrics to WORKDIR/metrics.jsonl and WORKDIR/tensorboard, and shows progress.

    Every entry has `step`. Values that depend on the clock or the device are under `timing`, so
    that two runs with the same numbers have the same other entries.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        step: int,
        steps: int,
        clock: speed.StepClock,
        enabled: bool,
        entries: int = 0,
    ):
        """`enabled`: False in processes without output. `entries`: the number in the resumed
        checkpoint's meta; missing ones are reported."""
        self.entries = 0  # in the file
        if enabled:
            self.entries, damage = metrics_file.keep_until(workdir / FILE, step, entries)
            if damage:
                print(damage, file=sys.stderr, flush=True)
        self._file = open(workdir / FILE if enabled else os.devnull, "a", buffering=1)
        self._board = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=step + 1, write_to_disk=enabled
        )
        self._bar = tqdm(
            initial=step,
            total=steps,
            desc="train",
            unit="step",
            mininterval=1.0,
            disable=not enabled,
        )
        self._step = step
        self.clock = clock

    def advance(self) -> None:
        self._step += 1
        self._bar.update()

    def log(self, step: int, values: dict[str, float], *, timed: bool = False) -> None:
        """Writes an entry. `timed`: with the speed; the device must have finished the step."""
        entry: dict = {"step": step, **values}
        if timed:
            entry["timing"] = figures = self.clock.read(step)
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)
            skipped = values.get("skipped_steps")
            self._bar.set_postfix_str(
                f"loss {values['loss']:.3f}, {speed.bar_text(figures)}"
                + (f", {skipped:,} steps skipped" if skipped else "")
            )
        for name, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, step)
        self._file.write(metrics_file.line_of(entry) + "\n")
        self.entries += 1

    def print(self, message: str) -> None:
        """Prints a line above the progress bar."""
        if not self._bar.disable:
            self._bar.write(message)

    def pause(self) -> None:
        """Excludes the time since the last log (evaluation, saving) from the next speed."""
        self.clock.restart(self._step)

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        self._board.close()


def _can_be_drawn(nats: float | None) -> bool:
    """Whether the value exists and its perplexity is finite."""
    return nats is not None and nats < 700 and math.isfinite(nats)


def plot_learning_curve(
    workdir: pathlib.Path, *, baseline: float | None = None, training: bool = True
) -> pathlib.Path:
    """Draws WORKDIR/learning_curve.png from metrics.jsonl: perplexity bounds against steps.

    Other metrics of config.train.metrics have a panel each. `baseline`: perplexity of a unigram
    model, drawn as a line. `training`: whether to draw the training
    loss; with low_variance it is not a bound.
    """
    os.environ["MPLBACKEND"] = "Agg"  # the import of matplotlib fails with an unknown backend
    from matplotlib import pyplot, ticker

    entries = read(workdir)
    others = sorted({name for e in entries for name in e if name.startswith("validation_")})
    others = [name for name in others if name != "validation_nelbo"]
    rows = 1 + len(others)
    figure, panels = pyplot.subplots(rows, figsize=(7, 4 * rows), layout="constrained")
    axes, *more = np.atleast_1d(panels)
    for panel, name in zip(more, others, strict=True):
        points = [(e["step"], e[name]) for e in entries if e.get(name) is not None]
        panel.plot(*zip(*points, strict=True), color="C0", marker="o")
        panel.set(xlabel="step", ylabel=name.removeprefix("validation_"))
    for name, label, style in (
        ("loss", "training loss", {"color": "0.7", "linewidth": 1}),
        ("validation_nelbo", "validation (EMA weights)", {"color": "C0", "marker": "o"}),
    ):
        points = [(e["step"], math.exp(e[name])) for e in entries if _can_be_drawn(e.get(name))]
        if points and (training or name != "loss"):
            axes.plot(*zip(*points, strict=True), label=label, **style)
    if baseline:
        axes.axhline(baseline, color="C3", linestyle="--", label=f"unigram model ({baseline:.0f})")
    axes.set(yscale="log", xlabel="step", ylabel="perplexity (upper bound)")
    axes.yaxis.set_major_formatter(ticker.LogFormatter())  # 100, not 10²
    axes.yaxis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(2, 0.5)))
    axes.legend()
    path = workdir / "learning_curve.png"
    with results.draft_of(path) as draft:
        figure.savefig(draft, dpi=120, format="png")
    pyplot.close(figure)
    return path
