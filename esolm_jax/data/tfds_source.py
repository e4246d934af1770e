"""Any TFDS dataset with a text feature, read at random access without TensorFlow."""

import re
from collections.abc import Iterator
from typing import Any

from esolm_jax.data import document_range
from esolm_jax.data.source import Source, named_splits
from esolm_jax.data.text_files import to_text
from esolm_jax.errors import UserError, nearest


def builder_of(config: Any) -> Any:
    """The builder of config.data.source, downloaded and prepared if necessary."""
    import tensorflow_datasets as tfds  # slow, and only this source needs it

    name, data_dir = config.data.source.removeprefix("tfds:"), config.data.tfds_dir or None
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare()
        return builder
    except tfds.core.registered.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        hint = nearest(re.split("[/:]", name)[0], known)
        where = f"neither TFDS nor config.data.tfds_dir={config.data.tfds_dir!r} has it"
        raise UserError(f"config.data.source='tfds:{name}': {where}{hint}") from error
    except Exception as error:  # bad version, bad spelling, no network: many types
        raise UserError(f"config.data.source='tfds:{name}': {error}") from error


def documents(config: Any, split: str, spec: str) -> Iterator[str]:
    """The texts of a TFDS split, or of splits joined by +, each with its range or without.

    Raises:
      UserError: no such split or text field, or a range that is malformed or empty.
    """
    builder, field = builder_of(config), config.data.text_field
    where = f"config.data.{split}={spec!r} of {builder.info.full_name}"
    parts = [
        _rows(builder, part.strip(), f"config.data.{split}", where) for part in spec.split("+")
    ]
    if field not in builder.info.features:
        fields = ", ".join(builder.info.features)
        raise UserError(f"{where}: no field config.data.text_field={field!r}; has: {fields}")
    for rows, indices in parts:
        for i in indices:
            yield to_text(rows[i][field], f"{where}, example {i}: field {field!r}")


def _rows(builder: Any, spec: str, name: str, where: str) -> tuple[Any, range]:
    """The examples of one split, and which of them its range selects; `name`: of the field."""
    base, chosen = document_range.split_spec(spec, name)
    if "[" in base:
        raise document_range.malformed(spec, name)
    try:
        rows = builder.as_data_source(base)
    except Exception as error:  # no such split, or prepared in a format without random access
        raise UserError(f"{where}: {error}") from error
    if chosen is None:
        return rows, range(len(rows))
    return rows, chosen.indices(len(rows), f"{name}={spec!r}")


def _given(config: Any) -> dict[str, str]:
    """An unspecified split is the dataset's own of that name, if it has one."""
    has = builder_of(config).info.splits
    given = named_splits(config)
    return {s: spec or (s if s in has or s == "train" else "") for s, spec in given.items()}


def _identity(config: Any) -> bytes:
    """Name and version of the dataset."""
    return builder_of(config).info.full_name.encode()


SOURCE = Source(
    "tfds",
    documents,
    given=_given,
    argument="<name>",
    identity=_identity,
    selects_ranges=True,
)
