"""The reader of Parquet files, with bounds on the memory and the time that a file takes.

Parquet stores a text that occurs often once, in a dictionary, so that a small file may stand for any number of bytes.
The file's own metadata need not say so. Texts therefore stay in dictionaries until the size of their rows is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_jax.data import readers, records
from llama_jax.data.records import BadLine, Sample

_MAX_GROUP_VALUES = 64  # times MAX_VALUES: values of one column of a row group, which take up to 8 bytes each
_NOT_DATA = (
    "which is implausible for training data; to train on it, write the file again without compression and dictionaries"
)


def table(path: Path, *, pairs: bool) -> Iterator[Sample | BadLine]:
    """The rows of a Parquet file. Columns that no record has a use for are not read.

    Raises:
        ValueError: the file is damaged, or compressed more than MAX_RATIO times.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        texts = _texts(pyarrow.parquet.read_metadata(path).schema)
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, read_dictionary=texts) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name in records.KEYS]
            others = dict.fromkeys(name for name in names if name not in columns)
            if not columns:
                raise ValueError(f"{path}: {records.why_unknown(others)}")
            allowed = max(readers.MAX_UNCHECKED, readers.MAX_RATIO * path.stat().st_size)
            for number, row in enumerate(_table_rows(file, columns, path), start=1):
                name = f"{path.as_posix()}:{number}"
                allowed -= _characters(row)
                if allowed < 0:
                    raise ValueError(
                        f"{path}: its rows are more than {readers.MAX_RATIO} times as large as the file, {_NOT_DATA}"
                    )
                if isinstance(row, str):
                    yield BadLine.of(name, row)
                else:
                    yield readers.parse_record(others | _without_nulls(row), name, pairs)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a whole Parquet file ({reason}); fetch or write it again") from error


def _texts(schema: Any) -> list[str]:
    """The paths of the columns of strings and bytes that are read."""
    columns = [schema.column(i) for i in range(len(schema)) if schema.column(i).path.split(".")[0] in records.KEYS]
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def _table_rows(file: Any, columns: list[str], path: Path) -> Iterator[dict[str, Any] | str]:
    """The rows of an open Parquet file as dicts, or as the reason why one cannot be read."""
    limit = readers.MAX_DOCUMENT
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        size = _group_size(file, group, columns, path)
        if size > limit * rows:  # then some row is too large, perhaps by much: none is read
            for _ in range(rows):
                yield f"its row group has {size >> 20:,} MiB in {rows:,} rows, and one document may have " + (
                    f"{limit >> 20:,} MiB: split the large ones"
                )
            continue
        batch_size = max(1, min(256, limit // (1 + size // max(rows, 1))))
        for batch in file.iter_batches(batch_size=batch_size, row_groups=[group], columns=columns):
            yield from _rows(batch)


def _group_size(file: Any, group: int, columns: list[str], path: Path) -> int:
    """The uncompressed bytes of the columns that are read of a row group, where a repeated text may count once.

    Raises:
        ValueError: a column is compressed more than MAX_RATIO times, or has too many values.
    """
    meta = file.metadata.row_group(group)
    total = 0
    for i in range(meta.num_columns):
        column = meta.column(i)
        if column.path_in_schema.split(".")[0] not in columns:
            continue
        size, stored = column.total_uncompressed_size, column.total_compressed_size
        if size > max(readers.MAX_UNCHECKED, readers.MAX_RATIO * stored):
            raise ValueError(
                f"{path}: column {column.path_in_schema!r} is compressed more than {readers.MAX_RATIO} times, "
                f"{_NOT_DATA}"
            )
        if column.num_values > _MAX_GROUP_VALUES * readers.MAX_VALUES:
            raise ValueError(
                f"{path}: a row group has {column.num_values:,} values in column {column.path_in_schema!r}: write the "
                "file again in smaller row groups"
            )
        width = file.schema.column(i).length or 0  # bytes of each value, where all have the same length
        total += max(size, width * column.num_values)
    return total


def _rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch as dicts, or as the reason why one cannot be read.

    A batch that is too large, or that has such a row, is divided into halves until the row is alone.
    """
    reason = ""
    if sum(map(_size, batch.columns)) > readers.MAX_DOCUMENT:
        reason = readers.too_large("row")
    else:
        try:
            yield from batch.to_pylist()
            return
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 at byte {error.start} of a string (0x{error.object[error.start]:02x})"
        except (ValueError, OverflowError) as error:
            reason = " ".join(str(error).split())
        except RecursionError:
            reason = "nested too deeply"
    if batch.num_rows == 1:
        yield reason
        return
    half = batch.num_rows // 2
    yield from _rows(batch.slice(0, half))
    yield from _rows(batch.slice(half))


def _size(array: Any) -> int:
    """The bytes of an array's values in Arrow's plain form, in which a repeated text counts each time."""
    import pyarrow
    import pyarrow.compute

    if isinstance(array, pyarrow.ExtensionArray):
        return _size(array.storage)
    if isinstance(array, pyarrow.DictionaryArray):
        lengths = pyarrow.compute.binary_length(array.dictionary)
        return 8 * len(array) + (pyarrow.compute.sum(lengths.take(array.indices)).as_py() or 0)
    if isinstance(array, pyarrow.StructArray):
        return 8 * len(array) + sum(map(_size, array.flatten()))
    if hasattr(array, "flatten"):  # lists of all kinds, and maps
        return 8 * len(array) + _size(array.flatten())
    return max(8 * len(array), array.nbytes)


def _characters(value: Any) -> int:
    """The characters of all strings in a cell, and one for each other value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, (dict, list)):
        return sum(map(_characters, value.values() if isinstance(value, dict) else value))
    return 1


def _without_nulls(value: Any) -> Any:
    """A cell of a table without keys that hold null.

    Parquet gives every struct of a column the keys of all the others.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
