"""`evaluate`: how well a model does on users' text."""

import csv
import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from fedsim.data.config import DataConfig
from fedsim.data.store import UserStore
from fedsim.errors import InvalidInput
from fedsim.terminal import shown, waiting
from fedsim.validation import require_at_least

NOT_PRIVATE = "Not private: these figures are computed from users' text without noise."
INTERVAL = 1.96
"""Standard errors to either side of a 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a model on users' text: loss, perplexity and accuracy, with their standard errors over users."""

    folder: Positional[str]
    """The folder of a finished run, a model or LoRA adapters in Hugging Face format, or a name on the hub."""
    data: DataConfig = field(default_factory=DataConfig)
    """Whose text, and how it becomes rows of tokens. By default what the run in FOLDER was trained with."""
    split: Literal["train", "validation", "test", "all"] = "test"
    """Which of the data's users: those that training with the same data options holds out (test, validation), those
    that it trains on (train), or all."""
    max_rows: int = 0
    """Most rows, of whole users drawn once; 0 for all."""
    users_file: Path | None = None
    """Write each user's rows, loss and accuracy to this CSV file, readable by its owner alone. Not private."""
    device: str | None = None
    """Where to compute (cpu, cuda, cuda:1); by default a GPU if there is one."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        require_at_least("max-rows", self.max_rows, 0)
        if self.users_file is not None and self.users_file.exists():
            raise InvalidInput("users-file", str(self.users_file), "a file that is not there yet")

    def run(self) -> int:
        """Load, measure, print."""
        from experiments.loading import loaded_for_use
        from fedsim.models.evaluate import evaluate_rows
        from fedsim.resources import open_data
        from server.evaluation import held_out_rows

        trained_with = _data_of_run(Path(self.folder).expanduser())
        data = trained_with if self.data == DataConfig() and trained_with is not None else self.data
        loaded = loaded_for_use(self.folder, self.device)
        with shown() as progress:
            resources = open_data(data, loaded, progress)
        loaded, store = resources.loaded, resources.store
        view = store if self.split == "all" else store.split(self.split)
        rows = held_out_rows(view, self.max_rows or view.num_rows)
        if not len(rows):
            raise InvalidInput("split", self.split, "users that the data has", f"There are no {self.split} users.")
        with waiting(f"Evaluating {len(rows):,} rows"):
            measured = evaluate_rows(loaded.model, view, loaded.objective, indices=rows)
        owners = np.searchsorted(view.user_offsets, rows, side="right") - 1
        users, position = np.unique(owners, return_inverse=True)
        by_user = measured.by_unit(position, len(users))
        if self.users_file is not None:
            _write_users(self.users_file, view, users, by_user)
        told = whose(self.split, data, trained_with)
        values = {"model": self.folder, "split": self.split, **figures(by_user), "in_words": [told, NOT_PRIVATE]}
        if self.json:
            print(json.dumps(values, ensure_ascii=False))
        else:
            _print(values)
        return 0


def figures(by_user: Any) -> dict[str, Any]:
    """What was measured, as JSON values: nats a label; null where it is not a number.

    Args:
        by_user: An EvaluationByUnit of users.
    """
    total, losses = by_user.total, by_user.losses[by_user.label_count > 0]
    error = by_user.loss_standard_error
    spread = np.quantile(losses, [0.1, 0.5, 0.9]) if len(losses) else np.full(3, np.nan)
    of_users = losses.std(ddof=1) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    values = {
        "users": len(losses),
        "rows": total.rows,
        "labels": total.label_count,
        "loss": total.loss,
        "loss_standard_error": error,
        "perplexity": total.perplexity,
        "perplexity_interval": [_exp(total.loss - INTERVAL * error), _exp(total.loss + INTERVAL * error)],
        "accuracy": total.accuracy,
        "accuracy_standard_error": by_user.accuracy_standard_error,
        "user_loss_mean": losses.mean() if len(losses) else math.nan,
        "user_loss_standard_error": of_users,
        "user_loss_quantiles": dict(zip(("0.1", "0.5", "0.9"), spread, strict=True)),
    }
    return {name: _plain(value) for name, value in values.items()}


def whose(split: str, data: DataConfig, trained_with: DataConfig | None) -> str:
    """Whether the users that were measured are users that the model was trained on, in a sentence.

    Args:
        split: Which of them.
        data: Whose text was measured.
        trained_with: Whose the model was trained on; None where that is not known.
    """
    if trained_with is None:
        return (
            "Whether these users took part in training is not known: no run's configuration lies beside the model. Of "
            "users that it was trained on, a model says nothing about others."
        )
    if dataclasses.replace(data, memory_limit=trained_with.memory_limit) != trained_with:
        return "The model was trained with other data options: whether it was trained on these users is not known."
    if split == "all":
        return "The model was trained on most of these users: it may do worse on others."
    if split == "train":
        return "The model was trained on these users: it may do worse on others."
    return f"These are {split} users: with the same data, training held them out."


def _data_of_run(folder: Path) -> DataConfig | None:
    """What a run's own configuration says of its data; None where no run's folder is there."""
    from fedsim.config import RunConfig
    from server.identity import stored_config

    for place in (folder, folder.resolve().parent if folder.resolve().name == "model" else folder):
        try:
            written = json.loads((place / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(written, dict) and isinstance(written.get("config"), dict):
            config: RunConfig = stored_config(RunConfig, written, str(place))
            return config.data
    return None


def _write_users(path: Path, view: UserStore, users: np.ndarray, by_user: Any) -> None:
    names = view.user_ids()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise InvalidInput("users-file", str(path), "a file that can be written", f"{error.strerror}.") from None
    with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("user", "rows", "labels", "loss", "accuracy"))
        columns = (by_user.rows, by_user.label_count, by_user.losses, by_user.accuracies)
        for user, *values in zip(users, *(column.tolist() for column in columns), strict=True):
            writer.writerow((names[user], *values))


def _print(values: dict[str, Any]) -> None:
    table = Table(title=f"{values['model']}, {values['users']:,} users", title_justify="left")
    for column in ("", "", "standard error over users"):
        table.add_column(column, justify="right" if column or len(table.columns) else "left")
    low, high = values["perplexity_interval"]
    table.add_row("loss, nats a label", _shown(values["loss"]), _shown(values["loss_standard_error"]))
    table.add_row("perplexity", _shown(values["perplexity"]), f"95 %: {_shown(low)} to {_shown(high)}")
    table.add_row("accuracy", _shown(values["accuracy"]), _shown(values["accuracy_standard_error"]))
    table.add_row(
        "mean of users' losses", _shown(values["user_loss_mean"]), _shown(values["user_loss_standard_error"])
    )
    spread = ", ".join(f"{float(share):.0%}: {_shown(loss)}" for share, loss in values["user_loss_quantiles"].items())
    console = Console()
    console.print(table)
    console.print(f"{values['rows']:,} rows, {values['labels']:,} labels; users' losses {spread}", highlight=False)
    for sentence in values["in_words"]:
        console.print(sentence, highlight=False)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return int(value)
