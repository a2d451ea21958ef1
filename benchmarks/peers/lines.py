"""What a training leaves: a line of JSON, read again with every field that the table needs, or refused by its name."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.certificates import ADD_OR_REMOVE, shown
from fedsim.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Line:
    """One training by one library.

    Attributes:
        peer: The library and its use, as the command line names it.
        date: UTC, YYYY-MM-DD.
        versions: Of the library and of what it computes with.
        task: What was asked, the learning rate and seed among it.
        seconds, processor_seconds: Of the training alone, and of all its processes.
        gradients: Gradient evaluations that it took.
        loss_before, validation_loss, test_loss: Nats a token on held-out users, measured by the same code for all.
        stated_epsilon: What the library says; None where it says nothing.
        stated_of: Whose data that is about, in a few words.
        user_epsilon: Certified here for the mechanism that ran; None where there is none.
        user_words: What change that hides, or why there is none.
        mechanism: Sampling and noise as they were.
        group_privacy_epsilon: What group privacy makes of an example's ε; None where it is not about examples.
    """

    peer: str
    date: str
    versions: dict[str, str]
    task: dict[str, Any]
    seconds: float
    processor_seconds: float
    gradients: float
    loss_before: float
    validation_loss: float
    test_loss: float
    stated_epsilon: float | None
    stated_of: str
    user_epsilon: float | None
    user_words: str
    mechanism: dict[str, Any]
    group_privacy_epsilon: float | None = None

    def to_json(self) -> str:
        values = {name: str(value) if value == math.inf else value for name, value in asdict(self).items()}
        return json.dumps({"benchmark": "peers", **values}, allow_nan=False)


OPTIONAL = {"group_privacy_epsilon"}


def read_line(text: str, place: str) -> Line:
    """The line that `to_json` wrote.

    Raises:
        InvalidInput: Names the place, and the first field that lacks.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidInput(place, text[:60], "a line of JSON", "Run the library's command again.") from error
    values = {item.name: found[item.name] for item in fields(Line) if item.name in found}
    for item in fields(Line):
        if item.name not in values and item.name not in OPTIONAL:
            raise InvalidInput(place, text[:60], f"a line with {item.name}", "Run the library's command again.")
    return Line(**{name: math.inf if value == str(math.inf) else value for name, value in values.items()})


def read(folder: Path) -> list[Line]:
    """All lines of the files *.jsonl in a folder, by file name.

    Raises:
        InvalidInput: Where there is none, or one lacks a field.
    """
    found = [
        read_line(text, f"{path.name}:{number}")
        for path in sorted(folder.glob("*.jsonl"))
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    ]
    if not found:
        raise InvalidInput("output", str(folder), "a folder with lines that the libraries' commands left")
    return found


def best(lines: Iterable[Line]) -> list[Line]:
    """Of each library's use, at each ε that was asked for, the runs at the learning rate of least validation loss:
    seeds' means as a line."""
    by_use: dict[tuple[str, float], dict[float, list[Line]]] = {}
    for line in lines:
        rates = by_use.setdefault((line.peer, line.task["epsilon"]), {})
        rates.setdefault(line.task["learning_rate"], []).append(line)
    return [
        _mean(min(rates.values(), key=lambda runs: np.mean([run.validation_loss for run in runs])))
        for rates in by_use.values()
    ]


def asked(lines: Iterable[Line], epsilon: float) -> list[Line]:
    """Those that were asked for one ε, at which libraries are compared."""
    return [line for line in lines if line.task["epsilon"] == epsilon]


def _mean(runs: Sequence[Line]) -> Line:
    """The last of these runs, with means of what differs by seed and the largest ε."""
    values = asdict(runs[-1])
    for name in ("seconds", "processor_seconds", "gradients", "validation_loss", "test_loss"):
        values[name] = float(np.mean([getattr(run, name) for run in runs]))
    values["user_epsilon"] = max((run.user_epsilon for run in runs if run.user_epsilon is not None), default=None)
    return Line(**values)


HEADER = (
    "library",
    "version",
    "held-out loss",
    "ε that it states",
    "user-level ε, certified",
    "gradients",
    "seconds",
    "processor seconds",
)


def table(lines: Sequence[Line], names: dict[str, str], packages: dict[str, str]) -> str:
    """Markdown, a row for each line, the lowest certified ε first, of equal ones (to two places) the lowest loss.

    Args:
        lines: One for each row.
        names: What a row is called, by peer.
        packages: Whose version it shows, by peer.
    """
    rows = [HEADER, ("---",) * len(HEADER)]

    def order(line: Line) -> tuple[float, float]:
        epsilon = math.inf if line.user_epsilon is None else line.user_epsilon
        return round(epsilon, 2) if epsilon < math.inf else epsilon, line.test_loss

    for line in sorted(lines, key=order):
        stated = "none" if line.stated_epsilon is None else f"{shown(line.stated_epsilon)} ({line.stated_of})"
        certified = shown(line.user_epsilon)
        if line.user_epsilon is None or line.user_words != ADD_OR_REMOVE:
            certified += f" ({line.user_words})"
        rows.append(
            (
                names.get(line.peer, line.peer),
                line.versions.get(packages.get(line.peer, ""), "–"),
                f"{line.test_loss:.3f}",
                stated,
                certified,
                f"{line.gradients:,.0f}",
                f"{line.seconds:.0f}",
                f"{line.processor_seconds:.0f}",
            )
        )
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"{text}\n\n{caption(lines)}"


def caption(lines: Sequence[Line]) -> str:
    """When, on which versions of what all compute with, of which task."""
    dates = sorted({line.date for line in lines})
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    task = lines[0].task
    before = ", ".join(sorted({f"{line.loss_before:.3f}" for line in lines}))
    torch, transformers = (
        ", ".join(sorted({line.versions[name] for line in lines if name in line.versions}))
        for name in ("torch", "transformers")
    )
    return (
        f"{days}; torch {torch}; transformers {transformers}; held-out loss before training {before}; asked for "
        f"ε = {task['epsilon']:g} at δ = {task['delta']:g}."
    )
