"""Second pass over the data: each user's examples gathered, cut into rows and written to the store.

What is done is set down now and then, and an interrupted pass goes on behind the last user that was: of the sort that
comes first it repeats what the remaining users need.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.data.config import DataConfig
from fedsim.data.encode import TextEncoder
from fedsim.data.group import GroupedParts, UserBatch
from fedsim.data.named_users import NamedUsers
from fedsim.data.shape import distinct, of_users_with, rows_of
from fedsim.data.sources import Progress
from fedsim.data.spool import Spooled
from fedsim.data.write import StoreWriter

STATE = "collected.json"
SECONDS_BETWEEN_STATES = 10.0
GROUPING, COMPARING = "Grouping by user", "Comparing users"


@dataclass(kw_only=True)
class Collected:
    """What is in the store so far.

    Attributes:
        last: Key of the last user whose examples were gathered.
        examples: Examples gathered.
        duplicates: Those left out because their user has the same.
        below: Users in the store below each edge between splits.
        named: Files of users' names.
        writer: Of the store's writer.
        whole: All users are gathered.
        doubts: What is doubtful about them; None until they are compared.
        classes: Names of the classes.
    """

    last: tuple[int, int] | None = None
    examples: int = 0
    duplicates: int = 0
    below: list[int] = field(default_factory=lambda: [0, 0])
    named: int = 0
    writer: dict[str, Any] | None = None
    whole: bool = False
    doubts: dict[str, Any] | None = None
    classes: list[str] = field(default_factory=list)


class Collection:
    """The store that is being written of the parts in a folder.

    Args:
        folder: Where the "store" is written.
        parts: What `spool` wrote.
        config: Resolved configuration.
        encoder: The tokenizer.
    """

    def __init__(self, folder: Path, parts: Spooled, config: DataConfig, encoder: TextEncoder):
        self._folder, self._parts, self._config, self._encoder = folder, parts, config, encoder
        file = folder / STATE
        self.done = Collected(**json.loads(file.read_text())) if file.is_file() else Collected()
        self.writer = StoreWriter(folder / "store", encoder.dtype, self.done.writer)
        self.names = NamedUsers(folder / "names", self.done.named)
        # What follows a text's beginning does not follow from the prompt alone.
        self._long_texts = "truncate" if encoder.framed == "apart" else config.long_texts
        self._edges = _edges(config)

    def run(self, progress: Progress) -> None:
        """Gather all users, and compare them.

        Args:
            progress: Told how far it is.

        Raises:
            Failure: The parts do not hold what was written.
        """
        if self.done.doubts is not None:
            return
        limit, names = self._config.memory_limit, self._config.label_names
        written, scratch = self._parts, self._folder / "scratch"
        with GroupedParts(written.files, written.examples, scratch, limit, self._encoder.dtype, names) as parts:
            self.done.classes = parts.classes
            if not self.done.whole:
                self._gather(parts, progress)
            self.done.doubts = self._compare(parts, progress)
            self._set_down()

    @property
    def splits(self) -> dict[str, list[int]]:
        """Ranges of users by thresholds on their sorted keyed hashes.

        A user's split depends on the user and the key alone: adding or removing a user moves no other user, so that
        neighbouring data sets have neighbouring training sets.
        """
        users = self.writer.num_users
        bounds = list(self.done.below)
        if not self._config.test_fraction:
            bounds[1] = users
        if not self._config.test_fraction and not self._config.validation_fraction:
            bounds[0] = users
        edges = [0, *bounds, users]
        return {name: edges[place : place + 2] for place, name in enumerate(("train", "validation", "test"))}

    def _gather(self, parts: GroupedParts, progress: Progress) -> None:
        set_down = time.monotonic()
        last = None if self.done.last is None else (self.done.last[0], self.done.last[1])
        for batch in parts.batches(progress, last):
            self._add(batch)
            if time.monotonic() > set_down + SECONDS_BETWEEN_STATES:
                self._set_down()
                set_down = time.monotonic()
            progress(GROUPING, self.done.examples, self._parts.examples)
        self.done.whole = True
        self._set_down()

    def _add(self, batch: UserBatch) -> None:
        examples, done, config = batch.examples, self.done, self._config
        kept = distinct(examples) if config.deduplicate else examples
        rows = rows_of(kept, config.sequence_length, self._long_texts, config.minimum_tokens, self._encoder.frame)
        added = self.writer.append(batch.keys, of_users_with(rows, config.minimum_rows))
        self.names.append(batch.names, added)
        below = np.searchsorted(batch.keys[added, 0], self._edges)
        done.below = [before + int(more) for before, more in zip(done.below, below, strict=True)]
        done.last = (int(batch.keys[-1, 0]), int(batch.keys[-1, 1]))
        done.examples += len(examples.lengths)
        done.duplicates += len(examples.lengths) - len(kept.lengths)

    def _compare(self, parts: GroupedParts, progress: Progress) -> dict[str, Any]:
        progress(COMPARING, 0, 3)
        doubts: dict[str, Any] = {"similar_users": self.names.similar(parts.connection)}
        progress(COMPARING, 1, 3)
        doubts["joint_users"] = self.names.joint(parts.connection)
        progress(COMPARING, 2, 3)
        doubts["shared_texts"] = parts.shared_texts()
        progress(COMPARING, 3, 3)
        return doubts

    def _set_down(self) -> None:
        """From here an interrupted pass goes on."""
        self.done.writer, self.done.named = self.writer.state(), self.names.number
        unfinished = self._folder / f"{STATE}.unfinished"
        unfinished.write_text(json.dumps(asdict(self.done)))
        os.replace(unfinished, self._folder / STATE)


def _edges(config: DataConfig) -> np.ndarray:
    """uint64 [2]: keyed hashes from which on users are for validation, and for the test."""
    train = 1 - config.validation_fraction - config.test_fraction
    shares = [train, train + config.validation_fraction]
    return np.array([min(int(share * 2**64), 2**64 - 1) for share in shares], np.uint64)
