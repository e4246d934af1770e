"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table(head: Sequence, rows: Iterable[Sequence]) -> str:
    """Lines that end in a newline; cells are written by str()."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
