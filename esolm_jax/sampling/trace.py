"""Traces: which pass generated each token, as a page to be played and as a picture. Host side."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from esolm_jax import results

GIVEN, NEVER = -1, -2  # in Trace.revealed_at
PICTURED = 8  # texts in a picture at most
TEMPLATE = pathlib.Path(__file__).with_name("trace.html")
# Distinguishable without colour: sequential marks are hollow and bars hatched.
COLOR = {"diffusion": "#0072b2", "sequential": "#d55e00", "given": "0.45"}
MARK = {
    "diffusion": {"marker": "o", "facecolors": COLOR["diffusion"], "linewidths": 0},
    "sequential": {"marker": "D", "facecolors": "none", "linewidths": 0.8},
}
BAR = {
    "diffusion": {"facecolor": COLOR["diffusion"]},
    "sequential": {"facecolor": "#fbe3d2", "hatch": "//////", "hatchcolor": COLOR["sequential"]},
}


@dataclasses.dataclass(frozen=True)
class Trace:
    """Which pass generated each token of a batch.

    Attributes:
      pieces: for each of B texts, the string of each of its tokens, at most L.
      revealed_at: int [B, L], the pass (0, 1, …) that generated each token; GIVEN by the prompt;
        NEVER generated, or beyond the text's end.
      is_diffusion: bool [B, L], whether that was in the diffusion phase, not the sequential one.
      title: one line.
    """

    pieces: list[list[str]]
    revealed_at: np.ndarray
    is_diffusion: np.ndarray
    title: str

    def text(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(revealed_at, is_diffusion) of a text without filler, each int [tokens]."""
        length = len(self.pieces[row])
        arrays = (np.asarray(a)[row, :length] for a in (self.revealed_at, self.is_diffusion))
        return tuple(a.astype(int) for a in arrays)


def write_html(trace: Trace, path: pathlib.Path) -> None:
    """Writes a page that plays the passes; it is one file and loads nothing."""
    texts = []
    for row, pieces in enumerate(trace.pieces):
        revealed, is_diffusion = (a.tolist() for a in trace.text(row))
        texts.append({"pieces": pieces, "revealed": revealed, "diffusion": is_diffusion})
    data = results.dumps({"title": trace.title, "texts": texts}, separators=(",", ":"))
    # All else is ASCII; without these three no token can end or comment out the script element.
    for sign in "<>&":
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    page = TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", data)
    results.write_text(pathlib.Path(path), page)


def _groups(revealed: np.ndarray, is_diffusion: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(phase, positions generated in it) of a text, both int [tokens]."""
    generated = revealed >= 0
    yield "diffusion", np.nonzero(generated & (is_diffusion == 1))[0]
    yield "sequential", np.nonzero(generated & (is_diffusion == 0))[0]


def _draw_text(axes, revealed: np.ndarray, is_diffusion: np.ndarray, passes: int) -> None:
    """A text's map of position x pass; given tokens are above the first pass."""
    size = float(np.clip(1500 / max(1, len(revealed)), 2, 14))  # of a mark, in points²
    for phase, at in _groups(revealed, is_diffusion):
        axes.scatter(
            at, revealed[at] + 1, s=size, edgecolors=COLOR[phase], label=phase, **MARK[phase]
        )
    top = passes / 14
    for what, label, where, color in (
        (GIVEN, "given", (-0.9 * top, 0.7 * top), COLOR["given"]),
        (NEVER, "not generated", (-top, 2 * passes), "0.92"),
    ):
        spans = [(at - 0.5, 1) for at in np.nonzero(revealed == what)[0]]
        axes.broken_barh(spans, where, color=color, linewidth=0, zorder=0.6, label=label)


def _draw_histogram(axes, rows, passes: int) -> None:
    """Tokens per pass, mean over `rows` of (revealed, is_diffusion), on the maps' pass axis."""
    left = np.zeros(passes)
    counts = {phase: np.zeros(passes) for phase in BAR}
    for revealed, is_diffusion in rows:
        for phase, at in _groups(revealed, is_diffusion):
            counts[phase] += np.bincount(revealed[at], minlength=passes) / len(rows)
    for phase, count in counts.items():
        # As one shape: the hatching of single bars would not show.
        edges = np.repeat(np.arange(passes + 1) + 0.5, 2)[1:-1]
        near, far = np.repeat(left, 2), np.repeat(left + count, 2)
        axes.fill_betweenx(edges, near, far, where=far > near, linewidth=0, **BAR[phase])
        left += count
    axes.set_title("tokens per pass", fontsize=10)
    axes.set_xlim(left=0)


def _legend(figure, maps) -> None:
    """A legend of the marks that occur in the maps."""
    entries = {}
    for axes in maps:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if len(handle.get_offsets() if label in MARK else handle.get_paths()):
                entries.setdefault(label, handle)
    handles, labels = list(entries.values()), list(entries)
    place = {"loc": "outside lower center", "ncols": 4, "frameon": False}
    legend = figure.legend(handles, labels, scatterpoints=1, **place)
    for handle, label in zip(legend.legend_handles, labels, strict=True):
        if label in MARK:
            handle.set_sizes([30])


def write_png(trace: Trace, path: pathlib.Path) -> None:
    """Draws for up to PICTURED texts which pass generated which position."""
    os.environ["MPLBACKEND"] = "Agg"  # matplotlib refuses to be imported with an unknown one
    from matplotlib import pyplot, ticker

    rows = [trace.text(row) for row in range(min(PICTURED, len(trace.pieces)))]
    passes = max([int(r.max(initial=0)) + 1 for r, _ in rows], default=1)
    length = max([len(r) for r, _ in rows], default=1)
    lines = 1 if len(rows) <= 4 else 2
    columns = -(-max(1, len(rows)) // lines)
    any_given = any((revealed == GIVEN).any() for revealed, _ in rows)
    figure, grid = pyplot.subplots(
        lines,
        columns + 1,
        figsize=(max(6.5, 2.4 * columns + 1.6), 2.9 * lines + 1),
        width_ratios=[1] * columns + [0.5],
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat:
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
    maps = list(grid[:, :-1].flat)
    for i, axes in enumerate(maps):
        axes.set_visible(i < len(rows))
        if i < len(rows):
            _draw_text(axes, *rows[i], passes)
            axes.set_title(f"text {i + 1}", fontsize=10)
            axes.set(xlabel="position in the text", xlim=(-1.5, length + 0.5))
    for line, axes in enumerate(grid[:, -1]):
        _draw_histogram(axes, rows[line * columns : (line + 1) * columns], passes)
        axes.set_xlabel("mean of the row" if columns > 1 else "tokens")
        axes.sharex(grid[0, -1])
        grid[line, 0].set_ylabel("pass")
    grid[0, 0].set_ylim(passes + 1, -passes / 14 if any_given else 0)
    _legend(figure, maps[: len(rows)])
    shown = f" ({len(rows)} of {len(trace.pieces)} texts)" if len(trace.pieces) > PICTURED else ""
    figure.suptitle(trace.title + shown, fontsize=12, parse_math=False)
    with results.draft_of(pathlib.Path(path)) as draft:
        figure.savefig(draft, dpi=110, format="png")
    pyplot.close(figure)
