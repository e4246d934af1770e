"""Tables as the Hugging Face hub serves them: .parquet, and .arrow of `datasets`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from esolm_jax.errors import UserError, brief

SUFFIXES = (".parquet", ".arrow")
_ROWS = 1024  # rows of a parquet file that are read at a time
_FILE_MAGIC = b"ARROW1"  # of Arrow's file format; `datasets` writes its stream format


def texts(path: Path, file: BinaryIO, field: str) -> Iterator[Any]:
    """The values of the column `field`, row after row, a batch of rows in memory.

    Raises:
      UserError: damaged, no such column, or it holds no text.
    """
    import pyarrow as pa  # slow, and only these files need it

    try:
        with contextlib.closing(pa.PythonFile(file, mode="r")) as source:
            for column in _columns(path, source, field):
                yield from column.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read: {brief(error)}") from error


def _columns(path: Path, source: Any, field: str) -> Iterator[Any]:
    """The column in batches."""
    import pyarrow as pa
    from pyarrow import parquet

    if path.suffix.lower() == ".parquet":
        table = parquet.ParquetFile(source)
        _check(path, table.schema_arrow, field)
        batches = table.iter_batches(batch_size=_ROWS, columns=[field])
    else:
        is_file = source.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        _check(path, reader.schema, field)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
    for batch in batches:
        yield batch.column(field)


def _check(path: Path, schema: Any, field: str) -> None:
    import pyarrow as pa

    if field not in schema.names:
        shown = ", ".join(schema.names[:20]) + (", …" if len(schema.names) > 20 else "")
        raise UserError(f"{path}: no column config.data.text_field={field!r}; has: {shown}")
    kind = schema.field(field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(
            f"{path}: column config.data.text_field={field!r}: must hold text, not {kind}"
        )
