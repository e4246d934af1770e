"""What every benchmark leaves behind: the figures, their table and their plot, side by side."""

import pathlib
from collections.abc import Callable, Iterable, Sequence

from esolm_jax import results


def table(head: Sequence, rows: Iterable[Sequence]) -> str:
    """Lines of Markdown that end in a newline; cells are written by str()."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def write(
    out: pathlib.Path, figures, text: str, draw: Callable[[pathlib.Path], None] | None = None
) -> None:
    """Writes `out`.json and .md, and .png if there is one to draw; prints the text and where."""
    out.parent.mkdir(parents=True, exist_ok=True)
    results.write_json(out.with_suffix(".json"), figures)
    results.write_text(out.with_suffix(".md"), text)
    if draw:
        draw(out.with_suffix(".png"))
    print(text + f"wrote {out}.json, .md" + (", .png" if draw else ""))
