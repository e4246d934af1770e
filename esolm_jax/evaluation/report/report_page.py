"""report.md, report.json and report.png of a report in its workdir."""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from esolm_jax import results
from esolm_jax.evaluation.suite import suite_report

JSON, PAGE, PLOT = "report.json", "report.md", "report.png"

_NOTES = {
    "exact": "The likelihood is exact: it has no noise.",
    "nelbo": "The bound (NELBO) is on the negative log-likelihood. ± error is Monte Carlo: of "
    "other draws of noise for the same windows. Noise belongs to the windows, so that no figure "
    "depends on the batch size or the devices.",
}
_POSITIONS = (
    "Each term of the bound belongs to the position of the token that it predicts, so nats over "
    "all positions add up to the bound. Errors here and below are the jackknife's over blocks of "
    "consecutive windows: of other windows and other noise."
)
_CALIBRATION = (
    "Predictions are the model's distributions (temperature 1, all tokens) of the tokens that the "
    "draws of the bound mask, given the tokens that the model reads there. A token counts once for "
    "each draw that masks it, without the weight of the bound. Accuracy is that of the most likely "
    "token, confidence is its probability. α_t is the probability that a token is known at the "
    "noise level of the draw (of the block, in block diffusion). If the model were exact, the mean "
    "entropy would equal the mean NLL."
)
_ECE = "ECE is the {}. It is positive even for an exact model with few predictions."


def paths(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The files of a report."""
    return [workdir / name for name in (PAGE, JSON, PLOT)]


def write(workdir: pathlib.Path, report: dict[str, Any]) -> None:
    """Writes report.json, report.md and report.png to the workdir."""
    results.write_json(workdir / JSON, report)
    with results.draft_of(workdir / PLOT) as draft:
        _plot(report, draft)
    results.write_text(workdir / PAGE, page(report))


def bounds_table(report: dict[str, Any]) -> list[str]:
    """The lines of the table of bounds: a row for each domain and bound, then all domains."""
    rows = list(report["data_sets"])
    if len(rows) > 1:
        rows.append({"name": "", "title": "all", **report["all"]})
    return suite_report.table(report | {"data_sets": rows})


def page(report: dict[str, Any]) -> str:
    """report.md."""
    whole, several = report["all"], len(report["data_sets"]) > 1
    bound = whole["results"][0]["bound"]
    parts = [
        "# Evaluation report",
        _made_by(report),
        "## Model and data",
        _table(("", ""), _facts(report)),
        "## Perplexity",
        "\n".join(bounds_table(report)),
        _NOTES[bound],
        *(f"- not evaluated: {note}" for note in report["missing"]),
        f"![Nats per token by position, and reliability diagram]({PLOT})",
        "## Perplexity by position",
        _table(*_positions(whole["positions"])),
        _POSITIONS,
        "## Calibration of the conditionals",
        _table(*_calibration([("", whole["calibration"])])),
    ]
    if several:
        found = [(one["title"], one["calibration"][:1]) for one in report["data_sets"]]
        parts.append(_table(*_calibration(found)))
    parts += [
        _CALIBRATION,
        _ECE.format(report["calibration_error"]),
        "Reliability of all predictions:",
        _table(*_reliability(whole["calibration"][0]["bins"])),
    ]
    return "\n\n".join(parts) + "\n"


def _made_by(report: dict[str, Any]) -> str:
    return (
        f"Made by `{report['command']}` at commit {report['commit']} (esolm_jax "
        f"{report['esolm_jax']}, code {report['code_sha256']}) on {report['time']}."
    )


def _facts(report: dict[str, Any]) -> Iterable[tuple[str, str]]:
    trained = report["trained_alpha_0"]
    at = f", trained at {trained:g}" if trained != report["alpha_0"] else ""
    yield "objective", f"{report['objective']}, α₀ = {report['alpha_0']:g}{at}"
    yield "checkpoint", f"step {report['step']}, {report['weights']} weights"
    yield "sha256 of the checkpoint", f"{report['checkpoint_sha256'] or 'unknown'}"
    yield "windows", f"of {report['seq_len']} tokens, {report['draws']} draws of noise each"
    yield "seed", f"{report['seed']}"
    yield "devices", f"{report['devices']}, jax {report['jax']}"
    for one in report["data_sets"]:
        data = one["data"]
        which = "all" if data["whole_split"] else f"{data['windows']:,} of"
        yield one["title"], f"{which} {data['split_windows']:,} windows; {one['origin']}"
        yield f"{one['title']}, sha256", data["split_sha256"]
        if one["unigram_perplexity"]:
            yield f"{one['title']}, unigram model", f"perplexity {one['unigram_perplexity']:.1f}"


def _positions(bins: Sequence[dict[str, Any]]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    head = "positions", "tokens", "nats/token", "± error", "exp(nats/token)"
    rows = [
        (
            f"{one['first']}–{one['last']}",
            f"{one['tokens']:,}",
            f"{one['nll_per_token']:.4f}",
            _number(one["standard_error"]),
            f"{one['perplexity']:.2f}",
        )
        for one in bins
        if one["tokens"]
    ]
    return head, rows


def _calibration(
    named: Sequence[tuple[str, Sequence[dict[str, Any]]]],
) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """A row for each group of each (domain, groups); domain "": the names of the groups."""
    head = "predictions of", "count", "accuracy", "confidence", "ECE", "± error"
    head += "entropy", "NLL", "NLL − entropy", "± error"
    rows = [
        (
            title or one["group"],
            f"{one['predictions']:,}",
            f"{one['accuracy']:.4f}",
            f"{one['mean_confidence']:.4f}",
            f"{one['ece']:.4f}",
            _number(one["ece_standard_error"]),
            f"{one['mean_entropy']:.4f}",
            f"{one['mean_nll']:.4f}",
            f"{one['nll_minus_entropy']:.4f}",
            _number(one["nll_minus_entropy_standard_error"]),
        )
        for title, groups in named
        for one in groups
    ]
    return head, rows


def _reliability(bins: Sequence[dict[str, Any]]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    head = "probability of the top token", "count", "mean", "accuracy"
    rows = [
        (
            f"{one['low']:.3f}–{one['high']:.3f}",
            f"{one['count']:,}",
            f"{one['confidence']:.4f}",
            f"{one['accuracy']:.4f}",
        )
        for one in bins
    ]
    return head, rows


def _number(value: float) -> str:
    return f"{value:.4f}" if value == value else "unknown"  # NaN


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """Nats by position; accuracy against confidence, above the counts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(11, 4.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1))
    _plot_positions(figure.add_subplot(grid[:, 0]), report)
    top = figure.add_subplot(grid[0, 1])
    _plot_reliability(top, figure.add_subplot(grid[1, 1], sharex=top), report)
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)


def _plot_positions(axes, report: dict[str, Any]) -> None:
    data_sets = report["data_sets"]
    for one in data_sets:
        bins = [b for b in one["positions"] if b["tokens"]]
        centre = [(b["first"] + b["last"]) / 2 for b in bins]
        axes.errorbar(
            centre,
            [b["nll_per_token"] for b in bins],
            [b["standard_error"] for b in bins],
            marker="o",
            markersize=3,
            capsize=2,
            label=one["title"],
        )
    bound = report["all"]["results"][0]["bound"]
    kind = "exact" if bound == "exact" else "terms of the NELBO"
    axes.set(xlabel="position of the predicted token", ylabel=f"nats per token ({kind})")
    axes.legend(fontsize="small")


def _plot_reliability(axes, counts, report: dict[str, Any]) -> None:
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    groups = report["all"]["calibration"]
    for group in groups:
        bins, label = group["bins"], f"{group['group']}: ECE {group['ece']:.3f}"
        confidence = [b["confidence"] for b in bins]
        width = 2 if group is groups[0] else 1
        axes.plot(
            confidence,
            [b["accuracy"] for b in bins],
            marker="o",
            markersize=3,
            linewidth=width,
            label=label,
        )
    for b in groups[0]["bins"]:
        counts.bar(b["low"], b["count"], b["high"] - b["low"], align="edge", color="C0")
    axes.set(ylabel="accuracy of the top token", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize="x-small")
    counts.set(yscale="log", xlabel="probability of the top token", ylabel="count")
