"""Records from a Hugging Face data set, by name or local folder, as a stream."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.data.column_paths import ABSENT, beginnings, inner_values, paths_in, require_columns, value_of
from fedsim.data.folders import is_saved
from fedsim.data.records import ASTRAY, Records
from fedsim.errors import InvalidInput
from fedsim.hugging_face import hub_failure

RECORDS_AT_ONCE = 1024
RECORDS_LOOKED_AT = 64
FROM_CSV = (
    "It is a data set that save_to_disk wrote after the datasets library had read CSV files without checking quotes "
    "and fields: read those CSV files with --data.source files. Where it is certain that they were read right, write "
    "the data set to a Parquet file (its to_parquet) and read that with --data.source files."
)
SINGLE_PRECISION = {"float16": np.float16, "float32": np.float32}


@dataclass(frozen=True, kw_only=True)
class HubData:
    """A split of a data set.

    Attributes:
        identity: What the records depend on.
        total: How many there are, where known.
        read: Starts reading from the beginning.
        beside: Columns that nobody asked for, with a few of their values.
    """

    identity: Any
    total: float | None
    read: Callable[[], Iterator[Records]]
    beside: Callable[[], dict[str, list[Any]]]


def open_hub(name: str, config: str | None, split: str, revision: str | None, wanted: Mapping[str, str]) -> HubData:
    """Open a data set for streaming.

    Args:
        name: Name on the hub, a local folder of data files, or a folder that `save_to_disk` wrote.
        config: The data set's configuration, if it has several.
        split: The data set's split.
        revision: Git revision on the hub.
        wanted: Column by the option that named it.

    Raises:
        InvalidInput: If the data set, configuration, split or a column does not exist, or it is made of CSV files.
    """
    data = _load(name, config, split, revision)
    info = getattr(data, "info", None)
    if getattr(info, "builder_name", None) == "csv":
        hint = "Read its files with --data.source files, which finds quotes and fields that do not match."
        hint = FROM_CSV if is_saved(Path(name).expanduser()) else hint
        raise InvalidInput("data.path", name, "a data set of another kind than CSV when data.source is hub", hint)
    with _readable(name):
        columns = data.column_names or list(next(iter(data), {}))
        heads = {column: _head(column, columns) for column in wanted.values()}
        first_row: dict[str, Any] = next(iter(data), {}) if heads.keys() - set(columns) else {}
    reached = [column for column in heads if value_of(first_row, column) is not ABSENT]
    require_columns(wanted, columns, name, reached=reached, inside=paths_in(first_row))
    known = info.splits.get(split) if info is not None and info.splits else None
    total = float(known.num_examples) if known is not None and known.num_examples else None
    identity = [name, config, split, revision, str(getattr(info, "version", None)), total, _local_files(name)]
    features = data.features or {}

    def read() -> Iterator[Records]:
        first = 1
        with _readable(name):
            for batch in data.select_columns(sorted(set(heads.values()))).iter(batch_size=RECORDS_AT_ONCE):
                values = {column: _column(batch[head], column, head, features) for column, head in heads.items()}
                records = Records(columns=values, origin=f"{name} ({split})", first=first, done=first - 1)
                yield records
                first += len(records)

    def beside() -> dict[str, list[Any]]:
        with _readable(name):
            rows = list(islice(iter(data), RECORDS_LOOKED_AT))
        return {column: [row[column] for row in rows] for column in columns if column not in heads.values()}

    return HubData(identity=identity, total=total, read=read, beside=beside)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """While records are read.

    Raises:
        InvalidInput: With what the datasets library said, where it cannot read a file.
    """
    import datasets

    try:
        yield
    except InvalidInput:
        raise
    except datasets.table.CastError as error:
        several = " and ".join(
            ", ".join(map(str, names)) for names in (error.requested_column_names, error.table_column_names)
        )
        hint = f"There are files with {several}. --data.source files reads each by its own, and says which lacks one."
        raise InvalidInput("data.path", name, "a data set all of whose files have the same columns", hint) from error
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        hint = f"It said: {_first_line(error)}. With --data.source files bad records are left out and counted."
        raise InvalidInput("data.path", name, "a data set whose files the datasets library can read", hint) from error


def _load(name: str, config: str | None, split: str, revision: str | None) -> Any:
    import datasets

    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file():
            saved = _saved(folder)
            if split not in saved:
                raise InvalidInput("data.hub-split", split, "one of " + ", ".join(saved))
            return saved[split]
        if (folder / "state.json").is_file():
            return _saved(folder)
        place = str(folder) if folder.exists() else name
        if place == name and not datasets.config.HF_HUB_OFFLINE and (failure := hub_failure(name, "dataset")):
            raise ConnectionError(f"the hub does not answer ({failure}); HF_HUB_OFFLINE=1 uses what its cache holds")
        return datasets.load_dataset(place, config, split=split, revision=revision, streaming=True)
    except InvalidInput:
        raise
    except (FileNotFoundError, ConnectionError) as error:
        hint = f"{type(error).__name__}: {_first_line(error)}"
        raise InvalidInput("data.path", name, "a data set on the hub or a local folder", hint) from None
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        hint = "Programs that come with data are not run: they could do anything on this machine."
        raise InvalidInput("data.path", name, f"a data set of plain files ({_first_line(error)})", hint) from None
    except ValueError as error:
        shown = f"{name}, configuration {config}, split {split}"
        raise InvalidInput(
            "data.path", shown, "a data set with that configuration and split", _first_line(error)
        ) from None


def _saved(folder: Path) -> Any:
    """What save_to_disk left in a folder. Where its files say other than they should, datasets ends in any error."""
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:
        hint = f"datasets.load_from_disk failed with {type(error).__name__}: {_first_line(error)}"
        raise InvalidInput("data.path", str(folder), "an undamaged folder of save_to_disk", hint) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _head(column: str, columns: list[str]) -> str:
    """The column that a name or path begins with."""
    return next((head for head, _ in ((column, ""), *beginnings(column)) if head in columns), column)


def _column(values: list[Any], column: str, head: str, features: Mapping[str, Any]) -> list[Any]:
    """The values at a path, from those of the column that it begins with."""
    feature = features.get(head)
    if column != head:
        path = column[len(head) + 1 :]
        values = inner_values(values, path)
        feature = _feature_of(feature, path)
    return _values(values, feature)


@dataclass(frozen=True)
class _ListOf:
    """The kind of a list of what lies inside each item of another."""

    feature: Any


def _feature_of(feature: Any, path: str) -> Any:
    """The kind of what lies at a path inside a feature; None where that is not known."""
    if isinstance(feature, dict):
        for head, rest in ((path, ""), *beginnings(path)):
            if head in feature:
                return _feature_of(feature[head], rest) if rest else feature[head]
    if (inner := getattr(feature, "feature", None)) is not None:
        first, _, rest = path.partition(".")
        if first.isdecimal():
            return _feature_of(inner, rest) if rest else inner
        return _ListOf(_feature_of(inner, path))
    return None


def _values(values: list[Any], feature: Any) -> list[Any]:
    """Class numbers as the names they stand for, bytes as text, and numbers of less than double precision as such."""
    if (inner := getattr(feature, "feature", None)) is not None:
        return [_values(value, inner) if isinstance(value, list) else value for value in values]
    names, single = getattr(feature, "names", None), SINGLE_PRECISION.get(getattr(feature, "dtype", ""))
    if names:
        return [names[value] if isinstance(value, int) and 0 <= value < len(names) else None for value in values]
    if single is not None:
        return [value if value is None or value is ASTRAY else single(value) for value in values]
    return [value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value for value in values]


def _local_files(name: str) -> list[Any]:
    folder = Path(name).expanduser()
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
    return [[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
