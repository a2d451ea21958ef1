"""Records from JSONL, CSV, TSV and Parquet files, plain or compressed, one file or many."""

import codecs
import glob
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fedsim.data.delimited import DelimitedReader, Joined
from fedsim.data.json_lines import LineParser
from fedsim.data.records import FOREIGN, MALFORMED, Malformed, Records, require_columns
from fedsim.errors import InvalidInput

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
DELIMITERS = {"csv": ",", "tsv": "\t"}
RECORDS_AT_ONCE = 4096
LINES_LOOKED_AT = 64
FILES_LOOKED_AT = 8
BEGINNING = 8192
"""Bytes in which the first line is to end."""
SAVED_BY_DATASETS = ("state.json", "dataset_dict.json")
"""What tells a folder that Hugging Face's `save_to_disk` wrote; its Arrow files are of another kind than ours."""
FROM_CSV = (
    "It is a data set that save_to_disk wrote after the datasets library had read CSV files without checking quotes "
    "and fields: read those CSV files with --data.source files. Where it is certain that they were read right, write "
    "the data set to a Parquet file (its to_parquet) and read that with --data.source files."
)
UNFINISHED = "_temporary"
HIDDEN = (".", UNFINISHED)
"""What names of files and folders begin with that are not meant as data: drafts of editors, notebooks' checkpoints,
what macOS puts beside each file ("._a.csv"), parts that Spark has not finished."""


def find_files(path: str, option: str = "data.path") -> list[Path]:
    """The data files that a path stands for, in order of their names.

    Args:
        path: A file, a folder (searched with its sub-folders; what is hidden in it is left out), or a pattern
            ("logs/*.jsonl.gz"; what is hidden is found where the pattern spells it).
        option: Name of the option, for the error.

    Raises:
        InvalidInput: If there is nothing there, or nothing in a known format.
    """
    known = "a JSONL, CSV, TSV or Parquet file (also .gz, .zst, .bz2, .lz4), or a folder or pattern of such files"
    place = Path(path).expanduser()
    if place.is_file():
        found = [place]
    elif place.is_dir():
        if any((place / mark).is_file() for mark in SAVED_BY_DATASETS):
            raise InvalidInput(option, path, known, _saved_by_datasets(place))
        inside = (file for file in sorted(place.rglob("*")) if not _hidden(file.relative_to(place)))
        found = [file for file in inside if file.is_file() and _format(file)]
    else:
        # glob passes over what begins with a dot, unless the pattern spells it.
        names = sorted(glob.glob(str(place), recursive=True))
        unfinished = {UNFINISHED} - set(place.parts)
        found = [file for file in map(Path, names) if file.is_file() and not unfinished & set(file.parts)]
        if not found:
            raise InvalidInput(option, path, known, "Nothing exists at that path.")
    unknown = [file for file in found if not _format(file)]
    if unknown or not found:
        raise InvalidInput(option, str(unknown[0]) if unknown else path, known)
    return found


def _saved_by_datasets(folder: Path) -> str:
    """What to do with a folder that `save_to_disk` wrote."""
    if any(b'"builder_name": "csv"' in file.read_bytes() for file in folder.rglob("dataset_info.json")):
        return FROM_CSV
    return "It is a data set that save_to_disk wrote: read it with --data.source hub."


def _hidden(file: Path) -> bool:
    return any(part.startswith(HIDDEN) for part in file.parts)


@dataclass(frozen=True, kw_only=True)
class DataFiles:
    """Data files, and how they are to be read.

    Attributes:
        files: What `find_files` found.
        wanted: Column by the option that names it.
        foreign: A .json file without any of the columns ("stats.json") is not data but lies beside it, and is given as
            one bad record, after the others. Otherwise, or where there is no other file, it is refused.
        quoted: Whether fields of CSV and TSV may stand in quotes; otherwise a quote is a letter like others.
    """

    files: list[Path]
    wanted: Mapping[str, str]
    foreign: bool = False
    quoted: bool = True

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
            for columns, numbers, share, joined in self._batches(file):
                yield Records(
                    columns=columns,
                    origin=file.name,
                    first=numbers[0],
                    numbers=numbers,
                    done=before + share * size,
                    joined=joined,
                )
            before += size
        for file in strange:
            before += file.stat().st_size
            columns = {column: [FOREIGN] for column in self.wanted.values()}
            yield Records(columns=columns, origin=file.name, first=1, done=before)

    def beside(self) -> dict[str, list[Any]]:
        """Columns that nobody asked for, with a few of their values, from the first files."""
        found: dict[str, list[Any]] = {}
        for file in self.files[:FILES_LOOKED_AT]:
            for column, values in _glance(file, self.quoted).items():
                if column not in self.wanted.values():
                    found.setdefault(column, []).extend(values)
        return found

    def _batches(self, file: Path) -> Iterator["Batch"]:
        kind = _format(file)
        if kind == "parquet":
            return _read_parquet(file, self.wanted)
        if kind == "json":
            return _read_json(file, self.wanted)
        return _read_delimited(file, self.wanted, self.quoted)

    def _is_strange(self, file: Path) -> bool:
        """Whether a file's name may mean another kind of JSON, and no line at its beginning has a wanted column."""
        if ".json" not in map(str.lower, file.suffixes):
            return False
        return not _glance(file, self.quoted).keys() & set(self.wanted.values())


def read_files(files: list[Path], wanted: Mapping[str, str]) -> Iterator[Records]:
    """The records of files, in order; see `DataFiles.read`."""
    return DataFiles(files=files, wanted=wanted).read()


def _format(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
        # Parquet compresses its columns itself and cannot be read through a stream.
        return None if suffixes and suffixes[-1] == ".parquet" else FORMATS.get(suffixes[-1]) if suffixes else None
    return FORMATS.get(suffixes[-1]) if suffixes else None


Batch = tuple[dict[str, list[Any]], Sequence[int], float, Collection[int]]
"""Values by column, the line or row of each record, the share of the file that has been read, and the places of
records that may be several."""


@contextmanager
def _opened(file: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The decompressed stream, and the file below it, whose position tells the progress.

    Raises:
        InvalidInput: If the file breaks off, or begins as UTF-16 does.
    """
    with file.open("rb") as raw:
        compression = COMPRESSIONS.get(file.suffix.lower())
        stream: BinaryIO = raw
        if compression is not None:
            stream = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), compression))
        try:
            if stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # type: ignore[attr-defined]
                hint = f"Convert it: iconv -f UTF-16 -t UTF-8 {file.name} > another file."
                raise InvalidInput("data.path", str(file), "UTF-8 text (it begins with the mark of UTF-16)", hint)
            yield stream, raw
        except (OSError, EOFError) as error:
            raise InvalidInput("data.path", str(file), "an undamaged file", f"It breaks off: {error}") from None


def _read_json(file: Path, wanted: Mapping[str, str]) -> Iterator[Batch]:
    size = max(1, file.stat().st_size)
    parser = LineParser(set(wanted.values()))
    with _opened(file) as (stream, raw):
        first = 1
        while lines := list(islice(stream, RECORDS_AT_ONCE)):
            records = parser.parse(lines)
            if first == 1:
                present = {key: None for record in records if isinstance(record, dict) for key in record}
                if present:
                    require_columns(wanted, list(present), file.name)
                elif any(lines) and all(record is MALFORMED for record in records):
                    raise InvalidInput("data.path", str(file), "JSON lines: one object ({…}) on every line")
            columns = {
                column: [record.get(column) if isinstance(record, dict) else record for record in records]
                for column in wanted.values()
            }
            yield columns, range(first, first + len(records)), raw.tell() / size, ()
            first += len(records)


def _read_delimited(file: Path, wanted: Mapping[str, str], quoted: bool) -> Iterator[Batch]:
    size = max(1, file.stat().st_size)
    with _opened(file) as (stream, raw):
        reader = _delimited(file, stream, wanted, quoted)
        require_columns(wanted, reader.header, file.name)
        places = {column: reader.header.index(column) for column in wanted.values()}
        for numbers, rows in reader.rows():
            columns = {
                column: [row if isinstance(row, Malformed) else row[place] or None for row in rows]
                for column, place in places.items()
            }
            joined = [place for place, row in enumerate(rows) if isinstance(row, Joined)]
            yield columns, numbers, raw.tell() / size, joined


def _delimited(file: Path, stream: BinaryIO, wanted: Mapping[str, str], quoted: bool) -> DelimitedReader:
    beginning = stream.peek(BEGINNING)  # type: ignore[attr-defined]
    line_end = "\r" if b"\r" in beginning and b"\n" not in beginning else "\n"
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=line_end)
    names = [column for option, column in wanted.items() if option in ("data.user-column", "data.owners-column")]
    return DelimitedReader(text, DELIMITERS[str(_format(file))], quoted=quoted, names=names)


def _read_parquet(file: Path, wanted: Mapping[str, str]) -> Iterator[Batch]:
    with _opened_parquet(file) as parquet:
        require_columns(wanted, parquet.schema_arrow.names, file.name)
        first, total = 1, max(1, parquet.metadata.num_rows)
        for batch in parquet.iter_batches(RECORDS_AT_ONCE, columns=sorted(set(wanted.values())), use_threads=False):
            columns = {column: python_values(batch.column(column)) for column in wanted.values()}
            yield columns, range(first, first + len(batch)), (first + len(batch) - 1) / total, ()
            first += len(batch)


def _opened_parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise InvalidInput("data.path", str(file), "an undamaged Parquet file", f"{error}") from None


def python_values(array: pa.Array) -> list[Any]:
    """An Arrow column's values: bytes as text, and numbers of less than double precision still as such, also in lists,
    records and dictionaries."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return python_values(array.dictionary_decode())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        items = iter(python_values(array.flatten()))
        lengths = pc.list_value_length(array).to_pylist()
        return [None if length is None else list(islice(items, length)) for length in lengths]
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        rows = zip(*map(python_values, array.flatten()), strict=True) if names else [()] * len(array)
        valid = array.is_valid().to_pylist()
        return [dict(zip(names, row, strict=True)) if there else None for row, there in zip(rows, valid, strict=True)]
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):
        return list(array.to_numpy(zero_copy_only=False))
    try:
        values: list[Any] = array.to_pylist()
    except UnicodeDecodeError:
        values = array.cast(pa.large_binary()).to_pylist()
    return [v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in values]


def _glance(file: Path, quoted: bool) -> dict[str, list[Any]]:
    """All columns of a file with the values of its first records."""
    kind = _format(file)
    if kind == "parquet":
        with _opened_parquet(file) as parquet:
            batch = next(parquet.iter_batches(LINES_LOOKED_AT, use_threads=False), None)
            return {} if batch is None else {name: python_values(batch[name]) for name in set(batch.schema.names)}
    columns: dict[str, list[Any]] = {}
    with _opened(file) as (stream, _):
        if kind == "json":
            records = LineParser(()).parse(list(islice(stream, LINES_LOOKED_AT)))
            for name, value in (item for record in records if isinstance(record, dict) for item in record.items()):
                columns.setdefault(name, []).append(value)
        else:
            reader = _delimited(file, stream, {}, quoted)
            rows = next(reader.rows(), ([], []))[1][:LINES_LOOKED_AT]
            whole = [row for row in rows if not isinstance(row, Malformed)]
            columns = {name: [row[place] for row in whole] for place, name in enumerate(reader.header)}
    return columns
