"""Which files a path stands for, what kind each is, and what its folders' names say (`user=ann/part-0.parquet`)."""

import glob
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

from fedsim.data.text_streams import COMPRESSIONS
from fedsim.errors import InvalidInput

FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
SAVED_BY_DATASETS = ("state.json", "dataset_dict.json")
"""What tells a folder that Hugging Face's `save_to_disk` wrote."""
UNFINISHED = "_temporary"
HIDDEN = (".", UNFINISHED)
"""What names of files and folders begin with that are not meant as data: drafts of editors, notebooks' checkpoints,
what macOS puts beside each file ("._a.csv"), parts that Spark has not finished."""
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
"""How Hive and Spark name the folder of rows in which the column is missing."""

Partition = Mapping[str, str | None]
"""What folders' names say of all rows of a file, by column."""


def find_files(path: str, option: str = "data.path") -> list[Path]:
    """The data files that a path stands for, in order of their names.

    Args:
        path: A file, a folder (searched with its sub-folders; what is hidden in it is left out), or a pattern
            ("logs/*.jsonl.gz"; what is hidden is found where the pattern spells it).
        option: Name of the option, for the error.

    Raises:
        InvalidInput: If there is nothing there, or nothing in a known format.
    """
    known = "a JSON, CSV, TSV or Parquet file (also .gz, .zst, .bz2, .lz4), or a folder or pattern of such files"
    place = Path(path).expanduser()
    if place.is_file():
        found = [place]
    elif place.is_dir():
        inside = (file for file in sorted(place.rglob("*")) if not _hidden(file.relative_to(place)))
        found = [file for file in inside if file.is_file() and kind_of(file)]
        if saved := sorted({file.parent for file in found if is_saved(file.parent)}):
            hint = f"It holds data sets that save_to_disk wrote: name one of them, such as {saved[0]}."
            raise InvalidInput(option, path, known, hint)
    else:
        # glob passes over what begins with a dot, unless the pattern spells it.
        names = sorted(glob.glob(str(place), recursive=True))
        unfinished = {UNFINISHED} - set(place.parts)
        found = [file for file in map(Path, names) if file.is_file() and not unfinished & set(file.parts)]
        if not found:
            raise InvalidInput(option, path, known, "Nothing exists at that path.")
    unknown = [file for file in found if not kind_of(file)]
    if unknown or not found:
        raise InvalidInput(option, str(unknown[0]) if unknown else path, known)
    return found


def kind_of(file: Path) -> str | None:
    """json, csv, tsv or parquet; None for a file of another kind."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
        # Parquet compresses its columns itself and cannot be read through a stream.
        return None if suffixes and suffixes[-1] == ".parquet" else FORMATS.get(suffixes[-1]) if suffixes else None
    return FORMATS.get(suffixes[-1]) if suffixes else None


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return any((folder / mark).is_file() for mark in SAVED_BY_DATASETS)


def partition_of(file: Path, path: str) -> dict[str, str | None]:
    """What the names of the folders between a path and one of its files say, in the form of Hive: `column=value`.

    Args:
        file: One of those found.
        path: The folder or pattern that was given. What stands above it, or before the first wildcard, says nothing.

    Returns:
        Values as text, None where Hive writes that there is none.

    Raises:
        InvalidInput: If two folders of one path name the same column.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        below = file.relative_to(place).parts[:-1]
    else:
        wild = next((at for at, part in enumerate(place.parts) if glob.has_magic(part)), len(place.parts))
        below = file.parts[wild:-1]
    found: dict[str, str | None] = {}
    for name in below:
        column, equals, value = (_plain(part) for part in name.partition("="))
        if not equals or not column:
            continue
        if column in found:
            raise InvalidInput("data.path", str(file), f"in folders that name each column once ({column!r} is twice)")
        found[column] = None if value in ("", NO_VALUE) else value
    return found


def named_above(path: str, column: str) -> str:
    """A hint where a folder above what was given is named after a column that is missing; else empty."""
    place = Path(path).expanduser().absolute()
    for folder in (place, *place.parents):
        if _plain(folder.name).startswith(f"{column}="):
            return f"The folder {folder.name} is named so: give the folder that it is in."
    return ""


def _plain(name: str) -> str:
    """A part of a folder's name without the escapes of Hive (%20); bytes that are not UTF-8 as lone surrogates."""
    return unquote(name, errors="surrogateescape")


def _hidden(file: Path) -> bool:
    return any(part.startswith(HIDDEN) for part in file.parts)
