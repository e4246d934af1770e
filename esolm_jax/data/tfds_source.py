"""Any TFDS dataset with a text feature, read at random access without TensorFlow."""

import re
from collections.abc import Iterator
from typing import Any

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
    """The texts of a TFDS split. UserError if there is no such split or text field."""
    builder, field = builder_of(config), config.data.text_field
    where = f"config.data.{split}={spec!r} of {builder.info.full_name}"
    try:
        rows = builder.as_data_source(spec)
    except Exception as error:  # no such split, or prepared in a format without random access
        raise UserError(f"{where}: {error}") from error
    if field not in builder.info.features:
        fields = ", ".join(builder.info.features)
        raise UserError(f"{where}: no field config.data.text_field={field!r}; has: {fields}")
    for i in range(len(rows)):
        yield to_text(rows[i][field], f"{where}, example {i}: field {field!r}")


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
