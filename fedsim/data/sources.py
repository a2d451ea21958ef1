"""Where records come from: embedded docstrings, files, Hugging Face data sets; and public text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedsim.cache import default_cache
from fedsim.data import docstrings as embedded
from fedsim.data.config import DataConfig
from fedsim.data.files import DataFiles, TextForm
from fedsim.data.folders import find_files, is_saved, kind_of, partition_of
from fedsim.data.hub import open_hub
from fedsim.data.records import Records
from fedsim.errors import InvalidInput

ROLES = ("user", "text", "prompt", "messages", "label", "owners")

TEXT_FORM = ("quotes", "delimiter", "encoding")
"""Options of text files alone."""

Progress = Callable[[str, float, float | None], None]
"""Told (what is being done, how much is done, how much there is)."""


def silent(what: str, done: float, total: float | None) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Records with users.

    Attributes:
        identity: What the records depend on (names, sizes, times, versions), as JSON: equal for equal data.
        columns: The column of each role ("user", "text", …) that the data has.
        total: The value of Records.done at the end, where known.
        read: Starts reading from the beginning.
        beside: Columns that nobody asked for, with a few of their values: somebody may have forgotten to name one.
    """

    identity: Any
    columns: dict[str, str]
    total: float | None
    read: Callable[[], Iterator[Records]]
    beside: Callable[[], Mapping[str, Sequence[Any]]] = dict


def open_source(config: DataConfig, cache: Path, progress: Progress = silent) -> Source:
    """The source that a resolved configuration names.

    Raises:
        InvalidInput: If the path, package, data set or a column does not exist.
    """
    if config.source == "docstrings":
        return _docstrings(config, cache, progress)
    columns = {role: getattr(config, f"{role}_column") for role in ROLES}
    columns = {role: column for role, column in columns.items() if column}
    wanted = {f"data.{role}-column": column for role, column in columns.items()}
    assert config.path is not None
    if config.source == "files" and not is_saved(Path(config.path).expanduser()):
        return _files(config, config.path, columns, wanted)
    _require_no_text_form(config, "save_to_disk wrote the data")
    hub = open_hub(config.path, config.hub_config, config.hub_split, config.hub_revision, wanted)
    return Source(identity=hub.identity, columns=columns, total=hub.total, read=hub.read, beside=hub.beside)


def _files(config: DataConfig, path: str, columns: dict[str, str], wanted: Mapping[str, str]) -> Source:
    files = find_files(path)
    kinds = set(map(kind_of, files))
    if not kinds & {"csv", "tsv"}:
        _require_no_text_form(config, "there are no CSV or TSV files", ("delimiter",))
    if kinds == {"parquet"}:
        _require_no_text_form(config, "all files are Parquet", ("encoding",))
    stats = [file.stat() for file in files]
    identity: list[list[Any]] = [[file.name, s.st_size, s.st_mtime_ns] for file, s in zip(files, stats, strict=True)]
    said = {file: partition for file in files if (partition := partition_of(file, path))}
    for file, known in zip(files, identity, strict=True):
        known += [said[file]] if file in said else []
    data = DataFiles(
        files=files,
        wanted=wanted,
        foreign=Path(path).expanduser().is_dir(),
        form=TextForm(
            quoted=config.quotes == "double", delimiter=config.field_delimiter, encoding=config.text_encoding
        ),
        partitions=said,
        path=path,
    )
    total = float(sum(s.st_size for s in stats))
    return Source(identity=identity, columns=columns, total=total, read=data.read, beside=data.beside)


def _require_no_text_form(config: DataConfig, why: str, options: Sequence[str] = TEXT_FORM) -> None:
    """Refuse options about how text files are written, where there are none.

    Raises:
        InvalidInput: Names the option.
    """
    for name in options:
        if (value := getattr(config, name)) != next(i.default for i in fields(DataConfig) if i.name == name):
            raise InvalidInput(f"data.{name}", value, f"left out where {why}")


def public_texts(cache: Path | None = None, progress: Progress = silent) -> Iterator[str]:
    """Public text without users: the docstrings of Python's standard library, in order of the modules' names.

    For tokenizers and pre-training. Nobody is protected here, and none of it is in the default private users.
    """
    library = embedded.find_library(embedded.STANDARD_LIBRARY)
    told = _reading(library.name, progress)
    for _, texts in embedded.docstrings(library, cache or default_cache(), told):
        yield from texts


def _docstrings(config: DataConfig, cache: Path, progress: Progress) -> Source:
    libraries = [embedded.find_library(name) for name in sorted(set(config.packages))]

    def read() -> Iterator[Records]:
        for library in libraries:
            done = 0
            for module, texts in embedded.docstrings(library, cache, _reading(library.name, progress)):
                columns = {"module": [module] * len(texts), "docstring": texts}
                yield Records(columns=columns, origin=module, first=1, done=done)
                done += len(texts)

    identity = [library.identity for library in libraries]
    return Source(identity=identity, columns={"user": "module", "text": "docstring"}, total=None, read=read)


def _reading(name: str, progress: Progress) -> Callable[[int, int], None]:
    return lambda done, total: progress(f"Reading docstrings of {name}", done, total)
