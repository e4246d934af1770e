"""Suite: data sets and published figures, read from a TOML file (zeroshot.toml is an example)."""

import dataclasses
import pathlib
import tomllib
from typing import Any

from esolm_jax import config as config_lib
from esolm_jax.data import document_range
from esolm_jax.errors import UserError, nearest
from esolm_jax.files import regular_file

NAMED = {"zeroshot": pathlib.Path(__file__).with_name("zeroshot.toml")}


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One data set of a suite.

    Attributes:
      name: its key in the file. title: in tables; its name by default.
      origin: where the user gets it.
      folder: below --data_root. split: files of the folder with this word in their path are read
        (validation-00000-of-00001.parquet, validation/data.arrow, x-validation.jsonl).
      range: "" or a range of documents, such as "[-100000:]".
      text_field, document, separator, keep_blank, detokenizer, document_end, window_specials:
        fields of config.data.
    """

    name: str
    origin: str
    folder: str
    split: str
    title: str = ""
    range: str = ""
    text_field: str = "text"
    document: str = "line"
    separator: str = ""
    keep_blank: bool = True
    detokenizer: str = "none"
    document_end: str = "none"
    window_specials: str = "bos_eos"

    def data_fields(self) -> dict[str, Any]:
        """Fields of config.data, by dotted name."""
        names = config_lib.fields().keys()
        own = dataclasses.asdict(self)
        return {f"data.{key}": value for key, value in own.items() if f"data.{key}" in names}


@dataclasses.dataclass(frozen=True)
class Published:
    """Published perplexities of one model, by name of the data set; `source` says where from.
    objective "": a model that this package has not."""

    model: str
    source: str
    perplexity: dict[str, float]
    objective: str = ""
    alpha_0: float = 1.0


@dataclasses.dataclass(frozen=True)
class Suite:
    """The data sets of a suite, in the order of its file."""

    name: str
    title: str
    data_sets: tuple[DataSet, ...]
    published: tuple[Published, ...] = ()


def read(given: str) -> Suite:
    """The suite of a name of NAMED, or of a TOML file.

    Raises:
      UserError: no such name or file, or a bad entry.
    """
    path = NAMED.get(given) or regular_file.expand(given)
    if given not in NAMED and not regular_file.is_there(path):
        names = ", ".join(NAMED)
        raise UserError(
            f"--suite={given}: must be {names} or a TOML file{nearest(given, list(NAMED))}"
        )
    where = f"--suite={given}"
    try:
        content = tomllib.loads(regular_file.read_text(path, regular_file.MB))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where}: not TOML: {error}") from error
    _check_keys(content, ("title", "defaults", "data", "published"), where)
    tables = {key: _table(content.get(key, {}), f"{where}: {key}") for key in ("defaults", "data")}
    if not tables["data"]:
        raise UserError(f"{where}: must have a table [data.NAME]")
    data_sets = tuple(
        _data_set(name, tables["defaults"], entry, f"{where}: data.{name}")
        for name, entry in tables["data"].items()
    )
    listed = content.get("published", [])
    if not isinstance(listed, list):
        raise UserError(f"{where}: published: must be tables [[published]]")
    published = tuple(_published(entry, data_sets, f"{where}: published") for entry in listed)
    title = content.get("title", path.stem)
    if not isinstance(title, str):
        raise UserError(f"{where}: title={title!r}: must be a string")
    return Suite(path.stem, title, data_sets, published)


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a table")
    return value


def _check_keys(entry: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in entry:
        if key not in known:
            raise UserError(
                f"{where}: {key}: unknown; must be one of {', '.join(known)}{nearest(key, known)}"
            )


def _checked(kind: type, entry: dict[str, Any], where: str) -> dict[str, Any]:
    """The entry. UserError unless its keys and types are those of the fields of a dataclass."""
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name != "name"}
    _check_keys(entry, tuple(fields), where)
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in entry:
            raise UserError(f"{where}: {name}: is missing")
    for key, value in entry.items():
        wanted = {str: str, bool: bool, float: (int, float)}.get(fields[key].type, dict)
        if not isinstance(value, wanted):
            raise UserError(f"{where}: {key}={value!r}: must be {fields[key].type.__name__}")
    return entry


def _data_set(name: str, defaults: dict[str, Any], entry: Any, where: str) -> DataSet:
    values = _checked(DataSet, defaults | _table(entry, where), where)
    data_set = DataSet(name, **{"title": name, **values})
    for field, value in data_set.data_fields().items():
        if not config_lib.is_allowed(field, value):
            check = config_lib.fields()[field].check
            hint = check.hint(value) if check else ""
            text = check.text if check else "another value"
            raise UserError(f"{where}: {field[5:]}={value!r}: must be {text}{hint}")
    if data_set.range and not document_range.is_range(data_set.range):
        raise document_range.malformed(data_set.range, f"{where}: range")
    if not name.replace("_", "").replace("-", "").isalnum():
        raise UserError(f"{where}: must be a name of letters, digits, - and _")
    return data_set


def _published(entry: Any, data_sets: tuple[DataSet, ...], where: str) -> Published:
    values = _checked(Published, _table(entry, where), where)
    _check_keys(values["perplexity"], tuple(d.name for d in data_sets), f"{where}: perplexity")
    for name, value in values["perplexity"].items():
        if not isinstance(value, int | float):
            raise UserError(f"{where}: perplexity: {name}={value!r}: must be a number")
    return Published(**values)
