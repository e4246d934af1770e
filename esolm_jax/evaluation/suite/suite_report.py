"""The report of a suite: a table, JSON, and a plot beside published figures."""

import pathlib
from typing import Any

from esolm_jax import results
from esolm_jax.evaluation.suite.suite_file import Suite

_HEAD = ("data set", "bound", "perplexity", "nats/token", "± error", "draws", "windows", "tokens")


def write(folder: pathlib.Path, report: dict[str, Any], suite: Suite) -> None:
    """Writes report.json, report.md and report.png to the folder."""
    results.write_json(folder / "report.json", report)
    lines = [f"# {report['title']}", "", _about(report), "", *table(report), ""]
    lines += [f"- not evaluated: {note}" for note in report["missing"]]
    for one in suite.published:
        lines.append(f"- {one.model}: {one.source}")
    results.write_text(folder / "report.md", "\n".join(lines) + "\n")
    with results.draft_of(folder / "report.png") as draft:
        _plot(report, suite, draft)


def _about(report: dict[str, Any]) -> str:
    protocol = {
        "all": "Every window has all terms of its bound, and no text is dropped. Errors are those "
        "of other draws of noise for the same windows.",
        "published": "Published protocol: batches are split by kappa, one draw a window, and the "
        "rest of each group of documents is dropped. Errors are over batches.",
    }[report["protocol"]]
    return (
        f"Model: {report['objective']}, alpha_0 = {report['alpha_0']:g}, step {report['step']}, "
        f"{report['weights']} weights; windows of {report['seq_len']} tokens. {protocol}"
    )


def table(report: dict[str, Any]) -> list[str]:
    """The lines of a Markdown table, a row for each data set and bound, with the published figures
    of the same objective and alpha_0."""
    same = [
        one
        for one in report["published"]
        if (one["objective"], one["alpha_0"]) == (report["objective"], report["alpha_0"])
    ]
    rows: list[tuple[str, ...]] = [(*_HEAD, *(f"published {one['model']}" for one in same))]
    for entry in report["data_sets"]:
        for result in entry["results"]:
            published = [one["perplexity"].get(entry["name"]) for one in same]
            rows.append((entry["title"], *_cells(result, entry["windows"]), *map(_text, published)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _cells(result: dict[str, Any], windows: int) -> list[str]:
    error = result["standard_error"]
    draws = result.get("num_samples") or result.get("num_orders")
    return [
        result["bound"],
        f"{result['perplexity']:.2f}",
        f"{result['nll_per_token']:.4f}",
        "unknown" if error is None else f"{error:.4f}",
        str(draws),
        f"{windows:,}",
        f"{result['num_tokens']:,}",
    ]


def _plot(report: dict[str, Any], suite: Suite, path: pathlib.Path) -> None:
    """Perplexity of each data set, logarithmic, with published figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(10, 4), layout="constrained")
    names = [entry["name"] for entry in report["data_sets"]]
    bounds = {result["bound"] for entry in report["data_sets"] for result in entry["results"]}
    for bound in sorted(bounds):
        values = [
            next((r["perplexity"] for r in entry["results"] if r["bound"] == bound), None)
            for entry in report["data_sets"]
        ]
        points = [(i, value) for i, value in enumerate(values) if value is not None]
        axes.plot(*zip(*points, strict=True), "o", label=f"this model, {bound}", zorder=3)
    for one, marker in zip(suite.published, "s^vD<>ph*" * len(suite.published), strict=False):
        points = [(i, one.perplexity[n]) for i, n in enumerate(names) if n in one.perplexity]
        if points:
            label = f"{one.model}, published"
            axes.plot(*zip(*points, strict=True), marker, label=label, fillstyle="none")
    axes.set_xticks(range(len(names)), [entry["title"] for entry in report["data_sets"]])
    axes.set(yscale="log", ylabel="perplexity", title=report["title"])
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_formatter(ticker.FormatStrFormatter("%g"))
    figure.legend(fontsize="small", loc="outside right")
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
