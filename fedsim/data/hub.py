"""Records from a Hugging Face data set, by name or local folder, as a stream."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.data.records import Records, require_columns
from fedsim.errors import InvalidInput
from fedsim.hugging_face import hub_failure

RECORDS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class HubData:
    """A split of a data set: what it depends on, its records where their number is known, and a way to read it."""

    identity: Any
    total: float | None
    read: Callable[[], Iterator[Records]]


def open_hub(name: str, config: str | None, split: str, revision: str | None, wanted: Mapping[str, str]) -> HubData:
    """Open a data set for streaming.

    Args:
        name: Name on the hub, a local folder of data files, or a folder that `save_to_disk` wrote.
        config: The data set's configuration, if it has several.
        split: The data set's split.
        revision: Git revision on the hub.
        wanted: Column by the option that named it.

    Raises:
        InvalidInput: If the data set, configuration, split or a column does not exist.
    """
    data = _load(name, config, split, revision)
    info = getattr(data, "info", None)
    columns = data.column_names or list(next(iter(data), {}))
    require_columns(wanted, columns, name)
    known = info.splits.get(split) if info is not None and info.splits else None
    total = float(known.num_examples) if known is not None and known.num_examples else None
    identity = [name, config, split, revision, str(getattr(info, "version", None)), total, _local_files(name)]
    features = data.features or {}
    names = {column: getattr(features.get(column), "names", None) for column in wanted.values()}

    def read() -> Iterator[Records]:
        first = 1
        for batch in data.select_columns(sorted(set(wanted.values()))).iter(batch_size=RECORDS_AT_ONCE):
            values = {column: _named(batch[column], names[column]) for column in wanted.values()}
            records = Records(columns=values, origin=f"{name} ({split})", first=first, done=first - 1)
            yield records
            first += len(records)

    return HubData(identity=identity, total=total, read=read)


def _load(name: str, config: str | None, split: str, revision: str | None) -> Any:
    import datasets

    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(folder))
            if split not in saved:
                raise InvalidInput("data.hub-split", split, "one of " + ", ".join(saved))
            return saved[split]
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(str(folder))
        place = str(folder) if folder.exists() else name
        if place == name and not datasets.config.HF_HUB_OFFLINE and (failure := hub_failure(name, "dataset")):
            raise ConnectionError(f"the hub does not answer ({failure}); HF_HUB_OFFLINE=1 uses what its cache holds")
        return datasets.load_dataset(place, config, split=split, revision=revision, streaming=True)
    except InvalidInput:
        raise
    except (FileNotFoundError, ConnectionError) as error:
        hint = f"{type(error).__name__}: {_first_line(error)}"
        raise InvalidInput("data.path", name, "a data set on the hub or a local folder", hint) from None
    except ValueError as error:
        shown = f"{name}, configuration {config}, split {split}"
        raise InvalidInput(
            "data.path", shown, "a data set with that configuration and split", _first_line(error)
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _named(values: list[Any], names: list[str] | None) -> list[Any]:
    """Class numbers as the names they stand for."""
    if not names:
        return values
    return [names[value] if isinstance(value, int) and 0 <= value < len(names) else None for value in values]


def _local_files(name: str) -> list[Any]:
    folder = Path(name).expanduser()
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
    return [[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
