"""The callback that tells a tracker of a run."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from server.callbacks.callback import BegunRun, Callback
from server.callbacks.trackers.flat import NOT_PRIVATE, Scalar, numbers_of, options_of, outcome_of
from server.results.run_folder import RunFolder, write_json

PROJECT = "fedsim"
"""What runs are filed under, where the tracker's own settings name nothing else."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """A run as trackers begin with it.

    Attributes:
        folder: The run's folder.
        name: What people shall see.
        options: What was set, and what came of it.
        known: What the tracker knows the run by, where it was told of it before.
        first_round: The first round that will be told; earlier ones stay, those from it on are told anew.
        private_only: Whether the tracker must not look for itself what the machine does: how busy it is, and when,
            tells how much text there is.
    """

    folder: Path
    name: str
    options: Mapping[str, Scalar]
    known: str | None
    first_round: int
    private_only: bool


class Tracked(Protocol):
    """A run in a tracker.

    Attributes:
        key: What the tracker knows it by.
    """

    key: str

    def log(self, round: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a round, or of the model before the first."""

    def summarise(self, outcome: Mapping[str, Scalar]) -> None:
        """What came out."""

    def close(self, finished: bool) -> None:
        """Nothing more comes; the run is finished, or was stopped."""


class Tracker(Callback):
    """Tells one tracker of a run.

    Where nothing that is not private may leave (`--release`, or metrics of training users kept out), the tracker hears
    of the run when it is finished, all at once and without "not_private": the moments at which rounds arrive would
    tell how long each took, and so how much text it drew.

    Args:
        name: The tracker's, for trackers.json in the run's folder, where a run that goes on finds what it is known by.
        begin: Begins a run in the tracker, or goes on with it.
    """

    def __init__(self, name: str, begin: Callable[[Opening], Tracked]) -> None:
        self.name = name
        self._begin = begin
        self._run = BegunRun(folder="")
        self._tracked: Tracked | None = None

    @property
    def _private_only(self) -> bool:
        return bool(self._run.config.get("release", False)) or not self._run.training_metrics

    def on_begin(self, run: BegunRun) -> None:
        """Begin, unless all is told at the end."""
        self._run, self._tracked = run, None
        if not self._private_only:
            self._open(0 if run.resumed_at is None else run.resumed_at + 1)

    def on_record(self, record: dict[str, Any]) -> None:
        """Tell of a round, unless all is told at the end."""
        if self._tracked is not None:
            self._tracked.log(record["round"], numbers_of(record))

    def on_end(self, summary: dict[str, Any]) -> None:
        """Tell what came out, and of all rounds where none was told before."""
        private_only = self._private_only
        tracked = self._open(0) if self._tracked is None else self._tracked
        if private_only:
            for record in RunFolder(self._run.folder).read_metrics():
                tracked.log(record["round"], numbers_of({**record, NOT_PRIVATE: {}}))
        tracked.summarise(outcome_of(summary, private_only=private_only))
        tracked.close(finished=True)

    def on_stop(self, reason: str) -> None:
        """Let the tracker know that nothing more comes for now."""
        if self._tracked is not None:
            self._tracked.close(finished=False)

    def _open(self, first_round: int) -> Tracked:
        folder = Path(self._run.folder)
        keys = folder / "trackers.json"
        known: dict[str, str] = json.loads(keys.read_text(encoding="utf-8")) if keys.exists() else {}
        self._tracked = self._begin(
            Opening(
                folder=folder,
                name=_name(folder),
                options=options_of(self._run.config, self._run.plan),
                known=known.get(self.name),
                first_round=first_round,
                private_only=self._private_only,
            )
        )
        if known.get(self.name) != self._tracked.key:
            write_json(keys, known | {self.name: self._tracked.key})
        return self._tracked


def _name(folder: Path) -> str:
    """A run by its folder, and by the comparison or sweep that it is part of."""
    within = folder.absolute().parent
    return folder.name if within.name == "runs" else f"{within.name}/{folder.name}"
