"""Records from JSON, CSV, TSV and Parquet files, plain or compressed, one file or many."""

import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from fedsim.data.arrow_values import python_values
from fedsim.data.column_paths import ABSENT, ArrowPath, paths_in, paths_of, require_columns, value_of, values_of
from fedsim.data.delimited import DelimitedReader, Joined
from fedsim.data.folders import Partition, kind_of, named_above
from fedsim.data.json_files import json_records
from fedsim.data.records import FOREIGN, MALFORMED, TWICE, Malformed, Records
from fedsim.data.text_streams import UTF_8, opened
from fedsim.errors import InvalidInput

DELIMITERS = {"csv": ",", "tsv": "\t"}
RECORDS_AT_ONCE = 4096
RECORDS_LOOKED_AT = 64
FILES_LOOKED_AT = 8
BEGINNING = 8192
"""Bytes in which the first line is to end."""

Batch = tuple[dict[str, list[Any]], Sequence[int], float, Collection[int]]
"""Values by column, the line or row of each record, the share of the file that has been read, and the places of
records that may be several."""


@dataclass(frozen=True, kw_only=True)
class TextForm:
    """How text files are written.

    Attributes:
        quoted: Whether fields of CSV and TSV may stand in quotes; otherwise a quote is a letter like others.
        delimiter: What stands between their fields; by default what the end of a file's name says.
        encoding: What texts are encoded in, by Python's own name of it.
    """

    quoted: bool = True
    delimiter: str | None = None
    encoding: str = UTF_8


@dataclass(frozen=True, kw_only=True)
class DataFiles:
    """Data files, and how they are to be read.

    Attributes:
        files: What `find_files` found.
        wanted: Column by the option that names it.
        foreign: A .json file without any of the columns ("stats.json") is not data but lies beside it, and is given as
            one bad record, after the others. Otherwise, or where there is no other file, it is refused.
        form: How those that are text are written.
        partitions: What folders' names say of files in them; a column of its own for each.
        path: What was given, for hints.
    """

    files: list[Path]
    wanted: Mapping[str, str]
    foreign: bool = False
    form: TextForm = TextForm()
    partitions: Mapping[Path, Partition] = field(default_factory=dict)
    path: str = ""

    def read(self) -> Iterator[Records]:
        """The records of the files, in order.

        Raises:
            InvalidInput: If a file is damaged, not UTF-8 at all, or lacks a column.
        """
        strange = [file for file in self.files if self.foreign and self._is_strange(file)]
        if len(strange) == len(self.files):
            strange = []
        before = 0.0
        for file in [file for file in self.files if file not in strange]:
            size = file.stat().st_size
            said, origin = self.partitions.get(file, {}), self._shown(file)
            for columns, numbers, share, joined in self._batches(file, origin, said):
                yield Records(
                    columns=columns,
                    origin=origin,
                    first=numbers[0],
                    numbers=numbers,
                    done=before + share * size,
                    joined=joined,
                )
            before += size
        for file in strange:
            before += file.stat().st_size
            columns = {column: [FOREIGN] for column in self.wanted.values()}
            yield Records(columns=columns, origin=self._shown(file), first=1, done=before)

    def beside(self) -> dict[str, list[Any]]:
        """Columns that nobody asked for, with a few of their values, from the first files."""
        found: dict[str, list[Any]] = {}
        heads = {column.partition(".")[0] for column in self.wanted.values()}
        for file in self.files[:FILES_LOOKED_AT]:
            for column, values in _glance(file, self.form).items():
                if column not in self.wanted.values() and column not in heads:
                    found.setdefault(column, []).extend(values)
        return found

    def _batches(self, file: Path, origin: str, said: Partition) -> Iterator[Batch]:
        read = {"parquet": _read_parquet, "json": _read_json}.get(str(kind_of(file)), _read_delimited)
        return read(_Reading(file, origin, self.wanted, said, self.form, self.path))

    def _shown(self, file: Path) -> str:
        """A file's name, with its folder's where that says something."""
        return "/".join(file.parts[-1 - len(self.partitions.get(file, {})) :])

    def _is_strange(self, file: Path) -> bool:
        """Whether a file's name may mean another kind of JSON, and no record at its beginning has a wanted column."""
        if ".json" not in map(str.lower, file.suffixes):
            return False
        found = _glance(file, self.form)
        record = {name: values[0] for name, values in found.items()}
        return not any(value_of(record, column) is not ABSENT for column in self.wanted.values())


def read_files(files: list[Path], wanted: Mapping[str, str]) -> Iterator[Records]:
    """The records of files, in order; see `DataFiles.read`."""
    return DataFiles(files=files, wanted=wanted).read()


@dataclass(frozen=True)
class _Reading:
    """One file, what is to be read of it, and what its folders say."""

    file: Path
    origin: str
    wanted: Mapping[str, str]
    said: Partition
    form: TextForm
    path: str

    def inside(self, present: Sequence[str], reached: Collection[str] = (), paths: Iterable[str] = ()) -> list[str]:
        """The wanted columns that are in the file, when all are there or said by its folders.

        Args:
            present: The file's columns.
            reached: Those wanted that are paths to something in these.
            paths: The paths to what is inside, to be shown.

        Raises:
            InvalidInput: If a column is missing, or there are several of that name; or none is in the file.
        """
        both = [*present, *self.said]
        missing = [column for column in self.wanted.values() if column not in both and column not in reached]
        hint = self._hint(missing[0], present) if missing else ""
        require_columns(self.wanted, both, self.origin, reached=reached, inside=paths, hint=hint)
        inside = [column for column in dict.fromkeys(self.wanted.values()) if column not in self.said]
        if not inside:
            raise InvalidInput("data.path", self.origin, "a file with the text in it, not in its folder's name")
        return inside

    def whole(self, columns: dict[str, list[Any]], count: int) -> dict[str, list[Any]]:
        """The columns with those that the folders' names say."""
        said = {column: [value] * count for column, value in self.said.items() if column in self.wanted.values()}
        return columns | said

    def _hint(self, column: str, present: Sequence[str]) -> str:
        if self.path and (hint := named_above(self.path, column)):
            return hint
        if self.form.delimiter is None and len(present) == 1 and kind_of(self.file) in DELIMITERS:
            other = next((mark for mark in ";\t|," if mark in present[0]), None)
            if other is not None:
                return f"Its fields seem to stand between {other!r}: name that with --data.delimiter."
        return ""


def _read_json(reading: _Reading) -> Iterator[Batch]:
    size = max(1, reading.file.stat().st_size)
    begun = False
    columns: list[str] = []
    for records, first, done in json_records(reading.file, reading.form.encoding, reading.wanted.values()):
        if not begun:
            maps = [record for record in records if isinstance(record, dict)]
            if not maps and all(record is MALFORMED for record in records):
                allowed = "JSON lines (one object, {…}, on every line), one list of objects, or LEAF's form"
                raise InvalidInput("data.path", str(reading.file), allowed)
            begun = bool(maps)
            if begun:
                present = list({key: None for record in maps for key in record})
                reached = [
                    column
                    for column in reading.wanted.values()
                    if column not in present and any(value_of(record, column) is not ABSENT for record in maps)
                ]
                inside = dict.fromkeys(path for record in maps[:RECORDS_LOOKED_AT] for path in paths_in(record))
                columns = reading.inside(present, reached, inside)
        if any(column in record for column in reading.said for record in records if isinstance(record, dict)):
            records = [_once(record, reading.said) for record in records]
        values = {column: values_of(records, column) for column in columns or reading.wanted.values()}
        numbers = range(first, first + len(records))
        yield reading.whole(values, len(records)) if columns else values, numbers, done / size, ()


def _once(record: Any, said: Partition) -> Any:
    """A record that gives none of the columns that its folders give already."""
    return TWICE if isinstance(record, dict) and any(column in record for column in said) else record


def _read_delimited(reading: _Reading) -> Iterator[Batch]:
    size = max(1, reading.file.stat().st_size)
    with opened(reading.file, reading.form.encoding) as (stream, raw):
        reader = _delimited(reading.file, stream, reading.wanted, reading.form)
        _require_text(reading.file, reader.header)
        places = {column: reader.header.index(column) for column in reading.inside(reader.header)}
        for numbers, rows in reader.rows():
            columns = {
                column: [row if isinstance(row, Malformed) else row[place] or None for row in rows]
                for column, place in places.items()
            }
            joined = [place for place, row in enumerate(rows) if isinstance(row, Joined)]
            yield reading.whole(columns, len(rows)), numbers, raw.tell() / size, joined


def _delimited(file: Path, stream: BinaryIO, wanted: Mapping[str, str], form: TextForm) -> DelimitedReader:
    beginning = stream.peek(BEGINNING)  # type: ignore[attr-defined]
    line_end = "\r" if b"\r" in beginning and b"\n" not in beginning else "\n"
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=line_end)
    names = [column for option, column in wanted.items() if option in ("data.user-column", "data.owners-column")]
    return DelimitedReader(text, form.delimiter or DELIMITERS[str(kind_of(file))], quoted=form.quoted, names=names)


def _require_text(file: Path, names: list[str]) -> None:
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        hint = "Name what its columns' names are written in: --data.encoding cp1252, say."
        raise InvalidInput("data.path", str(file), "a file in the encoding of data.encoding", hint) from None


def _read_parquet(reading: _Reading) -> Iterator[Batch]:
    with _opened_parquet(reading.file) as parquet:
        schema = parquet.schema_arrow
        paths = {column: ArrowPath(schema, option, column) for option, column in reading.wanted.items()}
        reached = [column for column, path in paths.items() if path.head is not None and path.rest]
        columns = reading.inside(schema.names, reached, paths_of(schema))
        asked = {column if paths[column].straight else str(paths[column].head) for column in columns}
        first, total = 1, max(1, parquet.metadata.num_rows)
        for batch in parquet.iter_batches(RECORDS_AT_ONCE, columns=sorted(asked), use_threads=False):
            values = {column: paths[column].of(python_values(batch.column(paths[column].head))) for column in columns}
            numbers = range(first, first + len(batch))
            yield reading.whole(values, len(batch)), numbers, (first + len(batch) - 1) / total, ()
            first += len(batch)


def _opened_parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise InvalidInput("data.path", str(file), "an undamaged Parquet file", f"{error}") from None


def _glance(file: Path, form: TextForm) -> dict[str, list[Any]]:
    """All columns of a file with the values of its first records."""
    kind = kind_of(file)
    if kind == "parquet":
        with _opened_parquet(file) as parquet:
            batch = next(parquet.iter_batches(RECORDS_LOOKED_AT, use_threads=False), None)
            return {} if batch is None else {name: python_values(batch[name]) for name in set(batch.schema.names)}
    columns: dict[str, list[Any]] = {}
    if kind == "json":
        records = next(json_records(file, form.encoding, (), RECORDS_LOOKED_AT), ([], 1, 0))[0]
        for name, value in (item for record in records if isinstance(record, dict) for item in record.items()):
            columns.setdefault(name, []).append(value)
        return columns
    with opened(file, form.encoding) as (stream, _):
        reader = _delimited(file, stream, {}, form)
        rows = next(reader.rows(), ([], []))[1][:RECORDS_LOOKED_AT]
        whole = [row for row in rows if not isinstance(row, Malformed)]
        return {name: [row[place] for row in whole] for place, name in enumerate(reader.header)}
