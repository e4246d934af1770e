"""Writes the outputs of a benchmark: figures as JSON, a page with a table, and a plot."""

import os
import pathlib
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence

from esolm_jax import results


def table(head: Sequence, rows: Iterable[Sequence]) -> str:
    """Lines of Markdown that end in a newline; cells are written by str()."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def commit() -> str:
    """The commit of this checkout, or "unknown"."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def machine() -> str:
    """The CPU and the number of its threads."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor() or 'unknown'])[0]}, {os.cpu_count()} CPU threads"


def write(
    out: pathlib.Path, figures, text: str, draw: Callable[[pathlib.Path], None] | None = None
) -> None:
    """Writes `out`.json and .md, and .png if `draw` is given; prints the text and the path. The
    page ends with the commit and the machine, unless the text names the commit."""
    text = text if "commit" in text else f"{text}\nRecorded at commit {commit()} on {machine()}.\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    results.write_json(out.with_suffix(".json"), figures)
    results.write_text(out.with_suffix(".md"), text)
    if draw:
        draw(out.with_suffix(".png"))
    print(text + f"wrote {out}.json, .md" + (", .png" if draw else ""))
