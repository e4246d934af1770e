"""JSONL of texts to be judged: what `sample` writes, or any other.

A line is an object with `text`, `token_ids` or both; or a string; or a list of ids. Blank lines are
skipped.
"""

import dataclasses
import pathlib
from typing import Any

from esolm_jax.errors import UserError, nearest
from esolm_jax.files import regular_file

MAX_BYTES = 4096 * regular_file.MB
TEXT, IDS = FIELDS = ("text", "token_ids")


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts of a file or a sampler; at least one.

    Attributes:
      name: names them in messages.
      texts: strings, or None.
      token_ids: ids of the tokenizer that wrote them, or None. `texts` or `token_ids` is not None.
    """

    name: str
    texts: list[str] | None = None
    token_ids: list[list[int]] | None = None

    @property
    def count(self) -> int:
        return len(self.texts if self.texts is not None else self.token_ids or [])


def read(path: str | pathlib.Path, flag: str = "--texts") -> Texts:
    """The texts of a JSONL file.

    Raises:
      UserError: no such file, no texts, or a line that is none of the allowed forms.
    """
    file = regular_file.expand(path)
    if not file.is_file():
        raise UserError(f"{flag}={path}: no such file")
    rows = []
    for number, line in enumerate(regular_file.read_text(file, MAX_BYTES).split("\n"), start=1):
        if line.strip():
            where = f"{file}, line {number}"
            rows.append(_row(regular_file.parse_json(line, where), where))
    if not rows:
        raise UserError(f"{flag}={path}: must have at least one text")
    if not any(all(field in row for row in rows) for field in FIELDS):
        raise UserError(f"{file}: every line must have the field text, or every line token_ids")
    return of_samples(str(path), rows)


def of_samples(name: str, rows: list[dict[str, Any]]) -> Texts:
    """Lines of `sample`, with the fields that all of them have."""
    texts, ids = ([row[field] for row in rows if field in row] for field in FIELDS)
    whole = len(rows)
    return Texts(name, texts if len(texts) == whole else None, ids if len(ids) == whole else None)


def _row(value: Any, where: str) -> dict[str, Any]:
    """The fields of a line. UserError: it has neither, or one is of a wrong type."""
    if isinstance(value, str):
        value = {TEXT: value}
    elif isinstance(value, list):
        value = {IDS: value}
    if not isinstance(value, dict) or not any(field in value for field in FIELDS):
        names = list(value)[:20] if isinstance(value, dict) else []
        close = next((hint for name in names if (hint := nearest(name, FIELDS))), "")
        raise UserError(
            f"{where}: must be an object with text or token_ids, a string or a list of ids{close}"
        )
    row = {field: value[field] for field in FIELDS if field in value}
    text = row.get(TEXT, "")
    if not isinstance(text, str):
        raise UserError(f"{where}: text: must be a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: text: character {error.start} is a lone surrogate") from error
    ids = row.get(IDS, [])
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise UserError(f"{where}: token_ids: must be a list of ids of a vocabulary")
    return row
