"""Rows that are given as objects, written down once, so that every process that computes reads the same file.

A list of dicts becomes JSON lines; what speaks Arrow (a DataFrame of pandas or polars, a table of pyarrow, a data set
of Hugging Face) becomes Parquet. Either lies in the cache under a name that is the hash of what is in it, for its
owner's eyes alone: it is the users' text.
"""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from fedsim.cache import unwritable, written_to
from fedsim.errors import InvalidInput

FOLDER = "given"
"""Sub-folder of the cache."""
ROWS_AT_ONCE = 4096
KINDS = (
    "a list of dicts, a dict of columns, a DataFrame, an Arrow table, a Hugging Face Dataset, or a path",
    "Each row says whose it is, and what was written: {'user_id': 'ann', 'text': 'Good morning.'}.",
)


def keep_rows(rows: Any, cache: Path, columns: Collection[str]) -> Path:
    """The file that holds these rows.

    Args:
        rows: Mappings of column to value, in any iterable; a mapping of column to values; or what speaks Arrow.
        cache: Folder of the cache.
        columns: Those that are asked for, or paths to them. A value of another column that is no JSON is left out.

    Returns:
        A file in the cache, the same for the same rows.

    Raises:
        InvalidInput: Rows are of another kind, or there are none; or a value of a column that is asked for is no text,
            number, list or dict; or the cache cannot be written.
    """
    if isinstance(rows, datasets.DatasetDict | datasets.IterableDatasetDict):
        split = next(iter(rows), "train")
        hint = f"Choose one: rows[{split!r}]. fedsim holds users out by itself."
        raise InvalidInput("rows", f"a DatasetDict of {', '.join(map(str, rows))}", "one of its splits", hint)
    folder = cache / FOLDER
    with written_to(cache):
        folder.mkdir(parents=True, exist_ok=True)
    if (tables := _tables(rows)) is not None:
        return _kept(folder, ".parquet", lambda file: _write_tables(tables, file))
    if isinstance(rows, Mapping | str | bytes) or not isinstance(rows, Iterable):
        raise InvalidInput("rows", type(rows).__name__, *KINDS)
    return _kept(folder, ".jsonl", lambda file: _write_lines(rows, file, set(columns)))


def _tables(rows: Any) -> Iterator[pa.Table] | None:
    """The rows as Arrow tables; None where they are none."""
    if isinstance(rows, datasets.Dataset | datasets.IterableDataset):
        batches: Iterator[pa.Table] = iter(rows.with_format("arrow").iter(ROWS_AT_ONCE))
        return batches
    try:
        if isinstance(rows, Mapping) and rows and all(map(_is_column, rows.values())):
            return iter([pa.table({str(name): _python(values) for name, values in rows.items()})])
        if hasattr(rows, "__arrow_c_stream__"):
            stream = pa.RecordBatchReader.from_stream(rows)
            return (pa.Table.from_batches([batch]) for batch in stream)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise _of_one_type(error) from error
    except ValueError as error:  # of pandas: two columns of one name, say
        raise InvalidInput("rows", "a table", *KINDS[:1], f"Reading it said: {error}") from error
    return None


def _is_column(values: Any) -> bool:
    return not isinstance(values, str | bytes | Mapping) and hasattr(values, "__len__")


def _python(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _of_one_type(error: Exception) -> InvalidInput:
    hint = f"Give rows as a list of dicts where values of one column differ in type. Arrow said: {error}"
    return InvalidInput("rows", "a table", "of one type in each column", hint.splitlines()[0])


def _write_tables(tables: Iterator[pa.Table], file: BinaryIO) -> int:
    writer, count = None, 0
    try:
        for table in tables:
            if writer is None:
                writer = pq.ParquetWriter(file, table.schema)
            writer.write_table(table.cast(writer.schema))
            count += len(table)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, ValueError) as error:
        raise _of_one_type(error) from error
    finally:
        if writer is not None:
            writer.close()
    return count


def _write_lines(rows: Iterable[Any], file: BinaryIO, wanted: set[str]) -> int:
    count = 0
    for place, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InvalidInput(f"rows[{place}]", type(row).__name__, "a dict", KINDS[1])
        file.write(_line(row, place, wanted).encode("ascii") + b"\n")
        count += 1
    return count


def _line(row: Mapping[Any, Any], place: int, wanted: set[str]) -> str:
    """One row as JSON; letters beyond ASCII are escaped, lone surrogates too."""
    try:
        return json.dumps(dict(row), default=_plain)
    except (TypeError, ValueError):
        kept = {}
        for name, value in row.items():
            try:
                json.dumps({name: value}, default=_plain)
            except (TypeError, ValueError) as error:
                if any(column == name or column.startswith(f"{name}.") for column in wanted):
                    allowed = "text, a number, a list or a dict"
                    raise InvalidInput(f"rows[{place}][{name!r}]", type(value).__name__, allowed) from error
                continue
            kept[name] = value
        return json.dumps(kept, default=_plain)


def _plain(value: Any) -> Any:
    """What numpy and torch hold, as Python's own; bytes as text, with what is no UTF-8 as lone surrogates."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(type(value).__name__)


def _kept(folder: Path, suffix: str, write: Callable[[BinaryIO], int]) -> Path:
    """The file that `write` fills, under the hash of what is in it; readable by its owner alone.

    A file that is there already stays as it is, for the time when it was written tells stores that it is the same.
    """
    with written_to(folder.parent):
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=".rows-", suffix=suffix)
    partial = Path(name)
    try:
        with _room_in(folder.parent), os.fdopen(descriptor, "wb") as file:
            count = write(file)
        if not count:
            raise InvalidInput("rows", "empty", *KINDS)
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()[:24]
        kept = folder / f"rows-{digest}{suffix}"
        if not kept.exists():
            os.replace(partial, kept)
        return kept
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


@contextmanager
def _room_in(cache: Path) -> Iterator[None]:
    """While rows are written, which may raise errors of their own.

    Raises:
        InvalidInput: Names FEDSIM_CACHE, where its disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise unwritable(cache, error) from error
        raise
