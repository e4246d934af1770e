"""Generates docs/config.md from the declarations: python -m esolm_jax.config.page docs/config.md"""

import pathlib
import sys

from esolm_jax.config import schema
from esolm_jax.config.field import Field, as_text

_READ_BY = {  # section → one sentence above its table
    "": "Fields without a section.",
    "data": "The text, its tokenizer and its windows.",
    "model": "The transformer.",
    "mesh": "The device mesh. The axes multiply to the number of devices; one axis may be -1.",
    "distributed": "Runs of several processes.",
    "optimizer": "AdamW and the average of the weights.",
    "train": "The training loop.",
    "eval": "`evaluate`.",
    "sample": "`sample`.",
}
_HEAD = """\
# The config

Every field of a run's config. A config file (`configs/*.py`) starts from `default_config()` and
sets fields; the command line overrides them: `--config.SECTION.FIELD=VALUE`.

This page is generated from the declarations in `esolm_jax/config/sections/`:

    python -m esolm_jax.config.page docs/config.md

Marks: **W** weights trained with one value cannot be used with another; **R** a resumed run may set
another value. Every number must be finite in 32 bits.
"""


def page() -> str:
    """The text of docs/config.md."""
    parts = [_HEAD]
    for section, table in schema.SECTIONS.items():
        title = f"`config.{section}`" if section else "`config`"
        parts.append(f"\n## {title}\n\n{_READ_BY.get(section, '')}\n")
        parts.append("\n| field | type | default | allowed | meaning | marks |\n")
        parts.append("|---|---|---|---|---|---|\n")
        parts += [_row(name, field) for name, field in table.items()]
    return "".join(parts)


def _row(name: str, field: Field) -> str:
    kind = type(field.default).__name__
    default = f"`{field.default!r}`".replace("'", '"')
    allowed = field.check.text if field.check else "`True`, `False`" if kind == "bool" else "any"
    marks = "W" * field.fixes_weights + "R" * field.may_change_on_resume
    doc = field.doc + "".join(f" Formerly `{old}`." for old in field.formerly)
    for old, now in field.former_values.items():
        doc += f" `{old}` is read as `{as_text(now)}`."
    cells = (f"`{name}`", kind, default, allowed, doc, marks)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    pathlib.Path(sys.argv[1]).write_text(page(), encoding="utf-8")
