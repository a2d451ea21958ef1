"""What all train: the model, users' rows of equal length, and how much may be computed. Written down once."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.peers.sides.side import Task
from fedsim.config import RunConfig
from fedsim.data.config import DataConfig
from fedsim.data.store import UserStore
from fedsim.models.config import DEFAULT_PATH, ModelConfig
from fedsim.resources import Resources, open_resources

ROW_TOKENS = 64
HELD_OUT_ROWS = 2000
"""Most rows of the validation users, and of the test users, drawn once."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Which text of which users, and which model.

    Attributes:
        path: Users' text as files (columns user_id and text); None takes docstrings of installed packages.
        model: A model's folder, or "default".
    """

    path: str | None = None
    model: str = DEFAULT_PATH

    def data(self) -> DataConfig:
        """A user's texts joined and cut into full rows, so that no batch is padded: where rows differ in length, the
        mean over a batch's tokens, which Hugging Face models take, lets one user's row change another's weight."""
        source = "docstrings" if self.path is None else "files"
        return DataConfig(
            source=source, path=self.path, sequence_length=ROW_TOKENS, long_texts="pack", minimum_tokens=ROW_TOKENS
        )

    def options(self) -> list[str]:
        """The same for fedsim's command line."""
        files = [] if self.path is None else ["--data.source", "files", "--data.path", self.path]
        rows = ["--data.sequence-length", str(ROW_TOKENS), "--data.long-texts", "pack"]
        return [*files, *rows, "--data.minimum-tokens", str(ROW_TOKENS), "--model.path", self.model]

    def resources(self) -> Resources:
        return open_resources(RunConfig(data=self.data(), model=ModelConfig(path=self.model)))


def rows_of(users: UserStore) -> tuple[np.ndarray, np.ndarray]:
    """All rows of a store, int64 [rows, tokens], and whose each is, int64 [rows].

    Raises:
        ValueError: If rows differ in length.
    """
    taken = users.take(np.arange(users.num_rows))
    lengths = np.unique(taken.lengths)
    if len(lengths) != 1:
        raise ValueError(f"rows have {lengths[0]} to {lengths[-1]} tokens; all must have as many")
    owners = np.repeat(np.arange(users.num_users), np.diff(users.user_offsets))
    return taken.tokens.reshape(users.num_rows, -1).astype(np.int64), owners


def drawn(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows, the same ones every time."""
    places = np.random.default_rng(0).permutation(len(rows))[:most]
    return rows[np.sort(places)]


def write(folder: Path, resources: Resources, task: Task) -> None:
    """Leave in a folder what a side reads: the model, the training users' rows, and the task. Held-out users' rows
    stand beside them, for whoever measures."""
    folder.mkdir(parents=True, exist_ok=True)
    resources.loaded.model.save_pretrained(folder / "model")
    resources.loaded.tokenizer.save_pretrained(folder / "model")
    rows, users = rows_of(resources.store.split("train"))
    np.savez(folder / "train.npz", rows=rows, users=users)
    held_out = {part: drawn(rows_of(resources.store.split(part))[0], HELD_OUT_ROWS) for part in ("validation", "test")}
    np.savez(folder / "held_out.npz", **held_out)
    (folder / "task.json").write_text(json.dumps(asdict(task)), encoding="utf-8")
