"""From a finished run to an entry: its event and options from its folder, its loss measured here."""

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.leaderboard.arguments import arguments_of
from benchmarks.leaderboard.check import ADJACENCY, UNIT, check
from benchmarks.leaderboard.entry import FOLDER, Chosen, Entry, Run
from benchmarks.leaderboard.tasks import Files, Opened, Task, task_named
from experiments.loading import loaded_for_use
from fedsim.config import RunConfig
from fedsim.errors import Failure, InvalidInput
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import from_json
from fedsim.versions import versions
from server.identity import stored_config

DECIMALS = 4
"""Of a stated ε, rounded up."""
DECIDING = ("python", "fedsim", "numpy", "torch", "transformers")
"""Versions that a loss may depend on."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a folder holds of a training.

    Attributes:
        model: The model's folder.
        event: What was released, JSON.
        unit, adjacency, delta: What its statement says that this is about.
        config: Its configuration; None where its folder has none.
        weights: Hash of the base model's weights; None where its folder does not say.
    """

    model: Path
    event: dict[str, Any]
    unit: str
    adjacency: str
    delta: float
    config: RunConfig | None = None
    weights: str | None = None

    @classmethod
    def of_folder(cls, folder: Path, event: Path | None, task: Task) -> "Trained":
        """Of a finished run, of what a private selection released, or of a model that something else trained.

        Args:
            folder: The folder.
            event: A file of the event's JSON, where the folder has no statement.
            task: Gives δ beside an event of one's own, which is about a user added or removed.

        Raises:
            InvalidInput: Something is missing, or the run claims nothing.
        """
        if event is not None:
            return cls(
                model=folder, event=_read(event), unit=UNIT, adjacency=ADJACENCY.value, delta=task.delta
            )  # what it is about is the entrant's word, and the page says so
        statement = _read(folder / "privacy.json")
        if not statement.get("private"):
            raise InvalidInput("folder", str(folder), "a run with a guarantee", "Its statement says that it has none.")
        said = {name: statement[name] for name in ("event", "unit", "adjacency", "delta")}
        if not (folder / "config.json").exists():
            return cls(model=folder / "model", **said)
        written = _read(folder / "config.json")
        config: RunConfig = stored_config(RunConfig, written, str(folder))
        weights = written.get("identity", {}).get("model")
        return cls(model=folder / "model", config=config, weights=weights, **said)


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What a person says beside the folders.

    Attributes:
        task, title, who, link, chosen: As in Entry.
        words: How it was made, where it was not by `fedsim train` with both seeds.
        event: A file of the event's JSON, for a model that something else trained.
        files: The task's text and base model; of a run of fedsim's train its own are taken.
    """

    task: str
    title: str
    who: str
    link: str
    chosen: Chosen
    words: str | None = None
    event: Path | None = None
    files: Files = field(default_factory=Files)


def entry_of(folders: Sequence[Path], said: Submission) -> Entry:
    """An entry of trainings that differ in their seeds alone.

    Raises:
        InvalidInput: Data, model or δ are not the task's, the runs differ, or a setting is none that a row has.
        Failure: What would be written does not stand: names each fault.
    """
    task = task_named(said.task)
    if not folders:
        raise InvalidInput("folders", [], "at least one run's folder")
    trained = [Trained.of_folder(folder, said.event, task) for folder in folders]
    first = trained[0]
    arguments = None if said.words else _arguments(trained, task)
    for one in trained:
        if one.delta != task.delta:
            raise InvalidInput("plan.delta", one.delta, f"{task.delta:g}, as in the task {task.name}")
        if one.event != first.event:
            raise InvalidInput("folders", [str(f) for f in folders], "runs that released the same: they differ in it")
    files = said.files
    if first.config is not None:
        given = {"data": first.config.data.path, "model": first.config.model.path}
        files = Files(**given) if task.fetched else Files()
    opened = Opened.of(task, files)
    weights, base_loss = opened.resources.weights, opened.base_loss
    for one in trained:
        if one.weights is not None and one.weights != weights:
            allowed = f"{weights[:12]}, the base model of {task.name}"
            raise InvalidInput("model", f"weights {one.weights[:12]} before training", allowed)
    entry = Entry(
        task=task.name,
        title=said.title,
        who=said.who,
        link=said.link,
        date=datetime.now(UTC).date().isoformat(),
        arguments=arguments,
        words=said.words,
        chosen=said.chosen,
        unit=first.unit,
        adjacency=first.adjacency,
        epsilon=_rounded_up(epsilon_bounds(from_json(first.event), task.delta, adjacency=ADJACENCY).upper),
        delta=first.delta,
        event=first.event,
        content=task.figures.content,
        runs=tuple(_run(one, opened) for one in trained),
        versions={name: versions()[name] for name in DECIDING},
        weights=weights,
        base_loss=base_loss,
    )
    if faults := check(entry).faults:
        raise Failure(f"this is no entry: {'; '.join(faults)}.")
    return entry


def keep(entry: Entry, folder: Path = FOLDER) -> Path:
    """Write an entry beside the others, under a name that follows from its task and title.

    Raises:
        InvalidInput: There is one of that name.
    """
    plain = unicodedata.normalize("NFKD", f"{entry.task} {entry.title}").encode("ascii", "ignore").decode().lower()
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', plain).strip('-')}.json"
    if path.exists():
        raise InvalidInput("title", entry.title, "one that no other entry of the task has", f"{path} is there.")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(entry.to_json(), encoding="utf-8")
    return path


def _arguments(trained: Sequence[Trained], task: Task) -> tuple[str, ...]:
    """What all of the runs were called with."""
    found = []
    for one in trained:
        if one.config is None:
            hint = "Say in --words how it was made; --data and --model name the task's files then."
            raise InvalidInput("folders", str(one.model), "folders of fedsim's train, with a config.json", hint)
        if None in (one.config.sampling_seed, one.config.noise_seed):
            hint = "Train again with --sampling-seed and --noise-seed, or say in --words how it was made."
            raise InvalidInput("folders", str(one.model.parent), "a run whose seeds were given", hint)
        found.append(arguments_of(one.config, task))
    if len(set(found)) > 1:
        raise InvalidInput("folders", [" ".join(one) for one in found], "runs that differ in their seeds alone")
    return found[0]


def _run(trained: Trained, opened: Opened) -> Run:
    loss = opened.loss(loaded_for_use(str(trained.model)))
    config = trained.config
    return Run(
        loss=loss,
        sampling_seed=None if config is None else config.sampling_seed,
        noise_seed=None if config is None else config.noise_seed,
    )


def _rounded_up(epsilon: float) -> float:
    """Room for the last digit in which accountants of two versions differ."""
    return math.ceil(epsilon * 10**DECIMALS) / 10**DECIMALS if math.isfinite(epsilon) else epsilon


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput("folder", str(path), "a file of JSON that can be read", f"{error}.") from None
    if not isinstance(values, dict):
        raise InvalidInput("folder", str(path), "a JSON object")
    return values
