"""What must be the same for two rows to be compared: text and users, base model, δ, and the rows of the loss."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.config import RunConfig, from_flat
from fedsim.data.store import UserStore
from fedsim.errors import InvalidInput
from fedsim.models.evaluate import evaluate
from fedsim.models.fingerprint import tokenizer_fingerprint
from fedsim.models.load import LoadedModel
from fedsim.plan import UserSizes
from fedsim.resources import Resources, open_resources
from fedsim.rows import SizeCounts
from server.evaluation import held_out_rows

FIGURES = Path(__file__).with_name("figures.json")
ROWS_AT_ONCE = 1 << 16
MADE_ALIKE = 0.02
"""Nats by which the loss of a base model that everybody makes may differ: the same recipe on another processor rounds
otherwise, and 500 steps of pre-training make other last digits of it, and another hash. Chosen, not measured."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a task's text and base model came to where the task was made: the command `task` finds them.

    Attributes:
        content: SHA-256 of all users' rows of tokens and of the splits, `content_of`.
        weights: SHA-256 of the base model's parameters and buffers, `fedsim.models.fingerprint.weights_fingerprint`.
        base_loss: Nats a token of the base model on the test rows.
        test_users, test_rows: How many of each are measured.
        users_by_rows: How many training users own how many rows; what a plan's event follows from.
        versions: What decides the text and the base model, where both are made on the spot.
    """

    content: str
    weights: str
    base_loss: float
    test_users: int
    test_rows: int
    users_by_rows: Mapping[str, int]
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where a task's text and base model lie, for tasks whose files everybody fetches.

    Attributes:
        data: A file, folder or pattern, as --data.path takes it.
        model: A folder, as --model.path takes it.
    """

    data: str | None = None
    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all of its rows have in common.

    Attributes:
        name: As entries call it.
        text: Whose text it is and where it is had, for people.
        base: Which model is fine-tuned, for people.
        options: Options of fedsim's data, and of the model that it makes, by name, but for paths.
        fetched: Whether text and model are files that everybody fetches; else fedsim makes both.
        decided_by: Packages whose version decides the text or the model that is made.
        delta: δ.
        most_rows: Most test rows that are measured, of whole users in keyed order; the last user may be cut.
        tiers: ε up to which rows compete, ascending. More than the last is refused.
    """

    name: str
    text: str
    base: str
    options: Mapping[str, Any]
    fetched: bool
    decided_by: tuple[str, ...] = ()
    delta: float = 1e-5
    most_rows: int = 2000
    tiers: tuple[float, ...] = (1.0, 2.0, 8.0)

    @cached_property
    def figures(self) -> Figures:
        """What is kept of it.

        Raises:
            InvalidInput: Nothing is.
        """
        kept = json.loads(FIGURES.read_text(encoding="utf-8"))
        if self.name not in kept:
            hint = f"Write it with: python -m benchmarks.leaderboard task {self.name}."
            raise InvalidInput("task", self.name, f"a task of which {FIGURES.name} has something", hint)
        return Figures(**kept[self.name])

    @property
    def sizes(self) -> UserSizes:
        """How many rows the training users own."""
        pairs = sorted((int(rows), users) for rows, users in self.figures.users_by_rows.items())
        counts = SizeCounts(sizes=np.array([r for r, _ in pairs]), users=np.array([u for _, u in pairs]))
        return UserSizes(
            num_users=counts.num_users,
            sizes=counts.sizes,
            users=counts.users,
            source=f"kept with the task {self.name}",
            private=False,
        )

    def config(self, files: Files) -> RunConfig:
        """Data and base model as a run has them, everything else by default.

        Raises:
            InvalidInput: Files are missing that the task needs, or given where it needs none.
        """
        where: dict[str, str] = {}
        for name, path in asdict(files).items():
            if self.fetched and not path:
                raise InvalidInput(name, path, f"where this task's {name} lies: {getattr(self, WORDS[name])}")
            if not self.fetched and path:
                raise InvalidInput(name, path, f"left out with {self.name}", "fedsim makes its text and its model.")
            where |= {f"{name}.path": path} if path else {}
        config: RunConfig = from_flat(RunConfig, {**self.options, **where})
        return config

    def tier(self, epsilon: float) -> float | None:
        """The least tier that an ε is within; None above all."""
        return next((tier for tier in self.tiers if epsilon <= tier), None)


WORDS = {"data": "text", "model": "base"}
"""The field that says where each file is had."""


@dataclass(frozen=True)
class Opened:
    """A task with its text and base model.

    Attributes:
        task: The task.
        resources: The model before training, and the users.
    """

    task: Task
    resources: Resources

    @classmethod
    def of(cls, task: Task, files: Files) -> "Opened":
        """Open, and refuse what is not the task's.

        Raises:
            InvalidInput: Names what differs.
        """
        opened = cls(task, open_resources(task.config(files)))
        opened.require_same()
        return opened

    @cached_property
    def rows(self) -> np.ndarray:
        """Rows of the test split whose loss counts, int64."""
        return held_out_rows(self.resources.store.split("test"), self.task.most_rows)

    def loss(self, loaded: LoadedModel) -> float:
        """Nats a token of a model on the task's test rows.

        Raises:
            InvalidInput: It is no fine-tuned base model, or nats a token are of other tokens.
        """
        own = self.resources.loaded
        if not loaded.adapted and _shapes(loaded) != _shapes(own):
            raise InvalidInput("model", loaded.base, f"one whose parameters are those of {self.task.base}")
        if tokenizer_fingerprint(loaded.tokenizer) != tokenizer_fingerprint(own.tokenizer):
            raise InvalidInput("model", loaded.base, f"a model with the tokenizer of {self.task.base}")
        view = self.resources.store.split("test")
        return evaluate(loaded.model.eval(), view, own.objective, indices=self.rows).loss

    @cached_property
    def base_loss(self) -> float:
        """That of the base model: ask before training."""
        return self.loss(self.resources.loaded)

    def found(self) -> Figures:
        """What `Task.figures` keeps, as it is here."""
        store, train = self.resources.store, self.resources.store.split("train")
        owners = np.searchsorted(store.split("test").user_offsets, self.rows, side="right")
        counts = SizeCounts.of(train)
        return Figures(
            content=content_of(store),
            weights=self.resources.weights,
            base_loss=self.base_loss,
            test_users=len(np.unique(owners)),
            test_rows=len(self.rows),
            users_by_rows={str(rows): int(users) for rows, users in zip(counts.sizes, counts.users, strict=True)},
            versions=versions_of(self.task.decided_by),
        )

    def require_same(self) -> None:
        """Refuse text or a base model that is not the task's."""
        kept, task = self.task.figures, self.task
        if (content := content_of(self.resources.store)) != kept.content:
            here = versions_of(task.decided_by)
            others = [f"{name} {here[name]}, not {said}" for name, said in kept.versions.items() if here[name] != said]
            why = f"Here it is made with {'; '.join(others)}." if others else f"It is: {task.text}."
            raise InvalidInput("data", f"text of the content {content[:12]}", f"that of {kept.content[:12]}", why)
        if self.resources.weights == kept.weights:
            return
        if task.fetched or abs(self.base_loss - kept.base_loss) > MADE_ALIKE:
            weights = f"weights {self.resources.weights[:12]} with a loss of {self.base_loss:.4f} before training"
            allowed = f"{kept.weights[:12]} with {kept.base_loss:.4f}"
            raise InvalidInput("model", weights, allowed, f"It is: {task.base}.")


def _shapes(loaded: LoadedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in loaded.model.named_parameters()}


def content_of(store: UserStore) -> str:
    """SHA-256 of what is trained and measured on: splits, users' rows and their tokens; of no name and no path."""
    splits = {name: store.manifest["splits"][name] for name in sorted(store.manifest["splits"])}
    digest = hashlib.sha256(json.dumps([splits, store.classes]).encode())
    digest.update(store.user_offsets.astype("<i8").tobytes())
    for start in range(0, store.num_rows, ROWS_AT_ONCE):
        rows = store.take(np.arange(start, min(start + ROWS_AT_ONCE, store.num_rows)))
        for column in (rows.lengths, rows.tokens, rows.labels, rows.classes):
            digest.update(b"-" if column is None else column.astype("<i8").tobytes())
    return digest.hexdigest()


def keep_figures(name: str, figures: Figures) -> None:
    """Write what a task came to beside those of the others."""
    kept = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    kept[name] = {item.name: getattr(figures, item.name) for item in fields(figures)}
    lines = ",\n".join(f"{json.dumps(task)}: {json.dumps(kept[task])}" for task in sorted(kept))
    FIGURES.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def versions_of(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of what is named, Python's for "python"."""
    from importlib.metadata import version
    from platform import python_version

    return {name: python_version() if name == "python" else version(name).split("+")[0] for name in packages}


TASKS = {
    task.name: task
    for task in (
        Task(
            name="docstrings",
            text="docstrings of torch, transformers, numpy and scipy as installed by `make`, a module a user",
            base="fedsim's default model, pre-trained on first use on docstrings of Python's standard library",
            options={"data.sequence-length": 64},
            fetched=False,
            decided_by=("python", "torch", "transformers", "numpy", "scipy"),
        ),
        Task(
            name="shakespeare",
            text="the speeches of Shakespeare's plays by role, a file that docs/results.md names",
            base="the Llama of 260,032 parameters that docs/results.md names, in Hugging Face's form",
            options={"data.source": "files", "data.sequence-length": 64},
            fetched=True,
            most_rows=10_000,  # all that there are
        ),
    )
}
"""By name."""


def task_named(name: str) -> Task:
    """A task.

    Raises:
        InvalidInput: There is none of that name.
    """
    if name not in TASKS:
        raise InvalidInput("task", name, "one of " + ", ".join(TASKS))
    return TASKS[name]
