"""An entry: what somebody says of a training, as one file of JSON. Nothing in it is believed before `check` has it."""

import json
import math
import re
import types
from dataclasses import asdict, dataclass
from datetime import date as Date
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from scipy.stats import t as student

from fedsim.errors import InvalidInput

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "leaderboard"
"""Where entries are kept."""
FORMAT = 1
Chosen = Literal["beforehand", "other public data", "private selection"]
"""How the settings came about. Chosen by results on the task's own users without being charged is no entry."""
PLAIN = re.compile(r"[^|<>\[\]`\n\r\t]{1,120}")
"""What may stand in a cell of the table."""
LINK = re.compile(r"https://[^\s|<>\[\]()`]{1,200}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        loss: Nats a token on the task's test rows, measured by `enter`.
        sampling_seed, noise_seed: What it can be repeated from; None where that was secret, as for a model that may
            be released.
    """

    loss: float
    sampling_seed: int | None
    noise_seed: int | None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of the table.

    Attributes:
        task: Its name.
        title: What was done, in a few words.
        who: Who did it.
        link: Where it is described; may be empty where arguments say all.
        date: UTC, YYYY-MM-DD.
        arguments: Of `fedsim`, without data, base model, seeds and place: what `reproduce` runs. None where something
            else trained.
        words: How it was made, where no arguments say so.
        chosen: How the settings came about.
        unit, adjacency: Whom the ε is about, and the change that it hides.
        epsilon, delta: What is claimed.
        event: What was released, as the JSON of fedsim's events.
        content, weights, base_loss: Of the text and the base model that it was measured with.
        runs: Trainings that differ in their seeds alone.
        versions: Of the software.
    """

    task: str
    title: str
    who: str
    link: str
    date: str
    arguments: tuple[str, ...] | None
    words: str | None
    chosen: Chosen
    unit: str
    adjacency: str
    epsilon: float
    delta: float
    event: dict[str, Any]
    content: str
    weights: str
    base_loss: float
    runs: tuple[Run, ...]
    versions: dict[str, str]

    def __post_init__(self) -> None:
        for name in ("title", "who", "words"):
            value = getattr(self, name)
            if value is not None and not PLAIN.fullmatch(value):
                raise InvalidInput(name, value, "1 to 120 characters in a line, none of | < > [ ] `")
        if not (LINK.fullmatch(self.link) or (self.link == "" and self.words is None)):
            allowed = "an https:// address" + (", or empty" if self.words is None else "")
            raise InvalidInput("link", self.link, allowed, "Whoever reads the row looks there for how it was made.")
        if (self.arguments is None) == (self.words is None):
            raise InvalidInput("words", self.words, "given where there are no arguments of fedsim, and only there")
        if self.chosen not in get_args(Chosen):
            hint = "Settings that were chosen by results on the task's users must be charged: sweep --select private."
            raise InvalidInput("chosen", self.chosen, "one of " + ", ".join(get_args(Chosen)), hint)
        try:
            Date.fromisoformat(self.date)
        except ValueError:
            raise InvalidInput("date", self.date, "a date, YYYY-MM-DD") from None
        if not self.runs:
            raise InvalidInput("runs", [], "at least one training")
        for value in (self.epsilon, self.delta, self.base_loss, *(run.loss for run in self.runs)):
            if not (math.isfinite(value) and value > 0):
                raise InvalidInput("epsilon, delta and losses", value, "finite and above 0")
        seeds = [(run.sampling_seed, run.noise_seed) for run in self.runs]
        if self.arguments is not None and any(None in pair for pair in seeds):
            hint = "Train with --sampling-seed and --noise-seed, or enter it in words."
            raise InvalidInput("runs", seeds, "trainings with both seeds, beside arguments", hint)
        if self.arguments is not None and len(set(seeds)) < len(seeds):
            raise InvalidInput("runs", seeds, "trainings with different seeds")

    @property
    def loss(self) -> float:
        """Mean over the runs."""
        return float(np.mean([run.loss for run in self.runs]))

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % interval of that mean, by Student's t over the runs; None of one run."""
        if len(self.runs) < 2:
            return None
        error = float(np.std([run.loss for run in self.runs], ddof=1)) / math.sqrt(len(self.runs))
        return float(student.ppf(0.975, len(self.runs) - 1)) * error

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_entry(path: Path) -> Entry:
    """An entry's file.

    Raises:
        InvalidInput: It cannot be read, or a field is missing, unknown, or of another type.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput("entry", str(path), "a file of JSON", f"{error}.") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise InvalidInput("entry", str(path), f"an entry of the format {FORMAT}")
    if isinstance(values.get("runs"), list):
        values["runs"] = [Run(**_typed(Run, run, path.name)) for run in values["runs"]]
    return Entry(**_typed(Entry, values, path.name))


def _typed(kind: type, values: Any, place: str) -> dict[str, Any]:
    """The fields of a dataclass, each there and of its type; lists as tuples."""
    hints = get_type_hints(kind)
    if not isinstance(values, dict) or set(values) != set(hints):
        given = sorted(set(values) ^ set(hints)) if isinstance(values, dict) else values
        raise InvalidInput(place, given, f"an object with the fields {', '.join(hints)}, and no others")
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, value in typed.items():
        if not _is(value, hints[name]):
            raise InvalidInput(f"{place}: {name}", value, f"of the type {hints[name]}")
    return typed


def _is(value: Any, hint: Any) -> bool:
    """Whether a value that JSON held is of an annotated type; of a Literal any string, which the class looks at."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is types.UnionType:
        return any(_is(value, option) for option in options)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is(one, options[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(options[1] is Any or _is(one, options[1]) for one in value.values())
    if origin is Literal:
        return isinstance(value, str)
    return type(value) is hint or (hint is float and type(value) is int)
