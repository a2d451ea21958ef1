"""Records from JSONL, CSV, TSV and Parquet files, plain or compressed, one file or many."""

import csv
import glob
import io
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from fedsim.data.records import FOREIGN, MALFORMED, Records, require_columns
from fedsim.errors import InvalidInput

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
RECORDS_AT_ONCE = 4096
LINES_LOOKED_AT = 64
SAVED_BY_DATASETS = ("state.json", "dataset_dict.json")
"""What tells a folder that Hugging Face's `save_to_disk` wrote; its Arrow files are of another kind than ours."""


def find_files(path: str, option: str = "data.path") -> list[Path]:
    """The data files that a path stands for, in order of their names.

    Args:
        path: A file, a folder (searched with its sub-folders), or a pattern ("logs/*.jsonl.gz").
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
            hint = "It is a data set that save_to_disk wrote: read it with --data.source hub."
            raise InvalidInput(option, path, known, hint)
        found = [file for file in sorted(place.rglob("*")) if file.is_file() and _format(file)]
    else:
        found = [Path(name) for name in sorted(glob.glob(str(place), recursive=True)) if Path(name).is_file()]
        if not found:
            raise InvalidInput(option, path, known, "Nothing exists at that path.")
    unknown = [file for file in found if not _format(file)]
    if unknown or not found:
        raise InvalidInput(option, str(unknown[0]) if unknown else path, known)
    return found


def read_files(files: list[Path], wanted: Mapping[str, str], *, foreign: bool = False) -> Iterator[Records]:
    """The records of the files, in order.

    Args:
        files: What `find_files` found.
        wanted: Column by the option that names it.
        foreign: A .json file without any of the columns ("stats.json") is not data but lies beside it, and is given
            as one bad record, after the others. Otherwise, or where there is no other file, it is refused.

    Raises:
        InvalidInput: If a file is damaged or lacks a column.
    """
    strange = [file for file in files if foreign and _is_strange(file, wanted)]
    if len(strange) == len(files):
        strange = []
    before = 0.0
    for file in [file for file in files if file not in strange]:
        size = file.stat().st_size
        kind = _format(file)
        reader = {"json": _read_json, "parquet": _read_parquet}.get(kind or "", _read_csv)
        for columns, first, share in reader(file, wanted):
            yield Records(columns=columns, origin=file.name, first=first, done=before + share * size)
        before += size
    for file in strange:
        before += file.stat().st_size
        columns = {column: [FOREIGN] for column in wanted.values()}
        yield Records(columns=columns, origin=file.name, first=1, done=before)


def _is_strange(file: Path, wanted: Mapping[str, str]) -> bool:
    """Whether a file's name may mean another kind of JSON, and no line at its beginning has a wanted column."""
    if ".json" not in map(str.lower, file.suffixes):
        return False
    stream, raw = _open(file)
    with raw:
        records = [_parse(line) for line in _lines(stream, file, LINES_LOOKED_AT)]
    return not any(column in record for record in records if isinstance(record, dict) for column in wanted.values())


def _format(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
        # Parquet compresses its columns itself and cannot be read through a stream.
        return None if suffixes and suffixes[-1] == ".parquet" else FORMATS.get(suffixes[-1]) if suffixes else None
    return FORMATS.get(suffixes[-1]) if suffixes else None


Batch = tuple[dict[str, list[Any]], int, float]


def _open(file: Path) -> tuple[BinaryIO, BinaryIO]:
    """The decompressed stream, and the file below it, whose position tells the progress."""
    raw = file.open("rb")
    compression = COMPRESSIONS.get(file.suffix.lower())
    if compression is None:
        return raw, raw
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), compression)), raw


def _read_json(file: Path, wanted: Mapping[str, str]) -> Iterator[Batch]:
    size = max(1, file.stat().st_size)
    stream, raw = _open(file)
    with raw:
        first = 1
        while lines := _lines(stream, file):
            records = [_parse(line) for line in lines]
            if first == 1:
                present = {key: None for record in records if isinstance(record, dict) for key in record}
                if present:
                    require_columns(wanted, list(present), file.name)
                elif any(lines) and not any(isinstance(record, dict) for record in records):
                    raise InvalidInput("data.path", str(file), "JSON lines: one object ({…}) on every line")
            columns = {
                column: [record.get(column) if isinstance(record, dict) else record for record in records]
                for column in wanted.values()
            }
            yield columns, first, raw.tell() / size
            first += len(records)


def _lines(stream: BinaryIO, file: Path, most: int = RECORDS_AT_ONCE) -> list[bytes]:
    lines: list[bytes] = []
    try:
        while len(lines) < most and (line := stream.readline()):
            lines.append(line)
    except (OSError, EOFError) as error:
        raise InvalidInput("data.path", str(file), "an undamaged file", f"It breaks off: {error}") from None
    return lines


def _parse(line: bytes) -> Any:
    """The object on a line; MALFORMED for anything else."""
    try:
        record = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return MALFORMED
    return record if isinstance(record, dict) else MALFORMED


def _read_csv(file: Path, wanted: Mapping[str, str]) -> Iterator[Batch]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    size = max(1, file.stat().st_size)
    stream, raw = _open(file)
    with raw:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, dialect="excel-tab" if _format(file) == "tsv" else "excel")
        header = next(reader, [])
        require_columns(wanted, header, file.name)
        places = {column: header.index(column) for column in wanted.values()}
        first = 1
        while rows := _csv_rows(reader):
            columns: dict[str, list[Any]] = {}
            for column, place in places.items():
                columns[column] = [
                    MALFORMED if row is None else row[place] if place < len(row) and row[place] else None
                    for row in rows
                ]
            yield columns, first, raw.tell() / size
            first += len(rows)
        text.detach()


def _csv_rows(reader: Any) -> list[list[str] | None]:
    rows: list[list[str] | None] = []
    while len(rows) < RECORDS_AT_ONCE:
        try:
            rows.append(next(reader))
        except StopIteration:
            break
        except csv.Error:
            rows.append(None)
    return rows


def _read_parquet(file: Path, wanted: Mapping[str, str]) -> Iterator[Batch]:
    try:
        parquet = pq.ParquetFile(file, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise InvalidInput("data.path", str(file), "an undamaged Parquet file", f"{error}") from None
    with parquet:
        require_columns(wanted, parquet.schema_arrow.names, file.name)
        first, total = 1, max(1, parquet.metadata.num_rows)
        for batch in parquet.iter_batches(RECORDS_AT_ONCE, columns=sorted(set(wanted.values())), use_threads=False):
            columns = {column: _python_values(batch.column(column)) for column in wanted.values()}
            yield columns, first, (first + len(batch) - 1) / total
            first += len(batch)


def _python_values(array: pa.Array) -> list[Any]:
    try:
        values: list[Any] = array.to_pylist()
    except UnicodeDecodeError:
        values = array.cast(pa.large_binary()).to_pylist()
    if pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type) or any(type(v) is bytes for v in values):
        return [v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in values]
    return values
