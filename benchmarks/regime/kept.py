"""What is kept of a finished sweep: a file small enough for a repository, from which the tables are made."""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from experiments.sweep.results import cells_of
from fedsim.versions import versions
from server.results.run_folder import write_json

LOSSES = ("validation_loss", "test_loss", "test_loss_before", "test_accuracy")
"""What of a point depends on the machine's arithmetic beyond the fifth digit."""
DIGITS = 6
"""Of these losses that are kept."""
CORPORA, RUNS = Path("corpora"), Path("runs/regime")
"""Folders as they are named where nobody's own are meant."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A finished sweep.

    Attributes:
        arguments: Of the command that made it, were the corpora in CORPORA and the sweeps in RUNS: the same for all.
        date: When it was finished.
        versions: Of Python and the packages.
        content: SHA-256 of each file or folder that it read, by name.
        pretrained_loss: Of test users, before training; nats.
        points: A row each, as `experiments.sweep.results.collect` has them.
    """

    arguments: list[str]
    date: str
    versions: dict[str, str]
    content: dict[str, str]
    pretrained_loss: float
    points: list[dict[str, Any]]

    def cells(self) -> list[dict[str, Any]]:
        """The settings of each algorithm, ε and compute, and the best of them."""
        return cells_of(self.points)


class Named(Protocol):
    """A sweep that can be run."""

    @property
    def name(self) -> str: ...

    @property
    def reads(self) -> tuple[str, ...]:
        """Files and folders of the folder of corpora."""
        ...

    def arguments(self, corpora: Path, output: Path) -> list[str]: ...


@dataclass(frozen=True)
class Shelf:
    """A folder of finished sweeps, a file each, and the folder of corpora that they read."""

    folder: Path
    corpora: Path

    def find(self, sweep: Named) -> Kept | None:
        """What is kept of it; None while it is not finished, or was with other settings, text or model."""
        path = self._path(sweep.name)
        if not path.exists():
            return None
        kept = Kept(**json.loads(path.read_text(encoding="utf-8")))
        same = kept.arguments == sweep.arguments(CORPORA, RUNS) and kept.content == self._content(sweep)
        return kept if same else None

    def keep(self, sweep: Named, output: Path) -> None:
        """Keep the results of a sweep that has just finished, in a folder of its name in `output`."""
        results = json.loads((output / sweep.name / "results.json").read_text(encoding="utf-8"))
        kept = Kept(
            arguments=sweep.arguments(CORPORA, RUNS),
            date=datetime.now(UTC).date().isoformat(),
            versions={name: value for name, value in versions().items() if name != "platform"},
            content=self._content(sweep),
            pretrained_loss=round(results["pretrained_loss"], DIGITS),
            points=[dict(_rounded(point)) for point in results["points"]],
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(sweep.name), asdict(kept))

    def _content(self, sweep: Named) -> dict[str, str]:
        return {name: digest_of(self.corpora / name) for name in sweep.reads}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


@functools.cache
def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes, or of names and bytes of all files of a folder, hexadecimal; of nothing, nothing."""
    if not path.exists():
        return ""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.relative_to(path).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _rounded(point: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in point.items():
        if name in LOSSES and value is not None:  # a loss that is no number is null
            value = round(value, DIGITS)
        yield name, round(value, 1) if name == "seconds" else value
