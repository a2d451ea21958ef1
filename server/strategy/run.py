"""A run of nodes and the folder that it leaves: begun, kept, gone on with, stated."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
from flwr.app import ArrayRecord
from safetensors.numpy import load_file, save_file

from fedsim.engine.node_messages import ArrayLayout
from fedsim.errors import InvalidInput
from fedsim.optimizer import ServerOptimizer
from fedsim.privacy.earlier import own_event
from fedsim.privacy.ledger import Ledger
from fedsim.release import Release
from fedsim.seeds import Seeds
from fedsim.statement import PrivacyStatement, privacy_statement
from fedsim.versions import versions
from server.checkpoint import Checkpoint, CheckpointWriter, read_latest
from server.identity import require_same
from server.results.run_folder import RunFolder, write_json
from server.round import Budget, Gather, Round
from server.strategy.nodes import Nodes
from server.strategy.settings import Settings
from server.training import require_charged

ARRAYS = "arrays.safetensors"
MARKS = ("config.json", "ledger.jsonl")
"""Files of a run that has begun."""


def require_free(path: Path, resume: bool) -> bool:
    """Whether a folder holds a run to go on with; nothing is made.

    Raises:
        InvalidInput: It holds a run although a new one was asked for.
    """
    used = [name for name in MARKS if (path / name).exists()]
    if used and not resume:
        hint = f"It has {used[0]}. Name another folder, or go on with that run: UserLevelDP(…, resume=True)."
        raise InvalidInput("output", str(path), "a folder without a run in it", hint)
    return bool(used)


class NodeRun:
    """A run under way. Made by begin or go_on.

    Args:
        folder: Where it is kept.
        settings: What it is.
        layout: The arrays that are trained.
        initial: Their first values, and other arrays.
        nodes: The users.
        ledger: Its ledger, open.
    """

    def __init__(
        self,
        folder: RunFolder,
        settings: Settings,
        layout: ArrayLayout,
        initial: ArrayRecord,
        nodes: Nodes,
        ledger: Ledger,
    ) -> None:
        self.folder, self.settings, self.layout, self.initial, self.ledger = folder, settings, layout, initial, ledger
        plan, seeds = settings.plan, Seeds.read(folder.secret)
        self.done = 0
        self.round = Round(
            plan,
            nodes,
            seeds,
            Budget(plan, ledger, settings.limit),
            Release(plan, layout.sizes, seeds.noise, exact=True),
            ServerOptimizer(layout.flatten(initial).astype(np.float32), settings.optimizer, plan.steps),
            exact=True,
        )
        self.checkpoints = CheckpointWriter(folder.checkpoints, rounds=settings.checkpoint_rounds, minutes=0, keep=2)

    @classmethod
    @contextmanager
    def begin(
        cls, path: Path, settings: Settings, layout: ArrayLayout, initial: ArrayRecord, nodes: Nodes
    ) -> Iterator[Self]:
        """A new run; its seeds and configuration are on disk before anything is charged."""
        folder = RunFolder(path)
        with folder.hold:
            folder.make()
            settings.seeds.store(folder.secret)
            identity = settings.identity(layout)
            folder.write_config(config={}, plan=settings.plan.to_values(), versions=versions(), identity=identity)
            with Ledger.open(folder.ledger) as ledger:
                run = cls(folder, settings, layout, initial, nodes, ledger)
                run._tell({})
                run.keep(wait=True)  # so that the disk is known to take one
                with run._written():
                    yield run

    @classmethod
    @contextmanager
    def go_on(
        cls, path: Path, settings: Settings, layout: ArrayLayout, initial: ArrayRecord, nodes: Nodes
    ) -> Iterator[Self]:
        """A run that was interrupted, from its last checkpoint; what was charged since then stays charged.

        Raises:
            InvalidInput: It is another run, or its ledger or seeds are not what it wrote.
        """
        folder = RunFolder(path, new=False)
        require_same(folder.read_config()["identity"], settings.identity(layout))
        with folder.hold, _opened(folder) as ledger:
            run = cls(folder, settings, layout, initial, nodes, ledger)
            latest = read_latest(folder.checkpoints)
            if latest is not None:
                require_charged(ledger, latest.round, int(latest.values["ledger_entries"]))
                run.round.load_state(latest.arrays)
                run.done = latest.round
            folder.cut_metrics(0 if latest is None else int(latest.values["metrics_bytes"]))
            if latest is None:
                run._tell({})
            with run._written():
                yield run

    @property
    def arrays(self) -> ArrayRecord:
        """The arrays after the rounds so far, each in its own type."""
        return self.layout.filled(self.initial, self.round.parameters)

    @property
    def epsilon(self) -> float:
        """Certified upper bound on the ε spent so far; 0 before the first round."""
        return self.round.budget.epsilon() if len(self.ledger) else 0.0

    def next_round(self, gather: Gather) -> dict[str, float]:
        """One more round, told of and kept; returns sums over its nodes, which are private.

        Raises:
            NotKept: Before the charge, where checkpoints can no longer be written.
            Diverged: The arrays are no longer finite.
        """
        if self.checkpoints.failure is not None:
            self._insist()
        statistics = self.round.run(self.done, gather)
        self.done += 1
        self._tell(statistics)
        self.keep()
        return statistics

    def keep(self, *, wait: bool = False) -> None:
        """Write a checkpoint, where one is due."""
        if self.checkpoints.on and self.checkpoints.due(self.done):
            self.checkpoints.write(self._state(), wait=wait)

    def _tell(self, statistics: Mapping[str, float]) -> None:
        """A line of metrics of the round just done.

        Args:
            statistics: Sums over its nodes: private.
        """
        plan = self.settings.plan
        self.folder.append_metrics(
            {
                "round": self.done,
                "epsilon": self.epsilon,
                "gradient_evaluations": self.done * plan.normaliser,
                "learning_rate": self.round.optimizer.learning_rate,
                "clip_norm": self.round.release.clip_norm,
                "not_private": {} if self.settings.release else dict(statistics),
            }
        )

    def statement(self) -> PrivacyStatement:
        """What the rounds so far guarantee, from plan and ledger."""
        return privacy_statement(
            self.settings.plan,
            own_event(self.ledger.entries),
            sizes=self.layout.sizes,
            steps=self.done,
            seeds_given=self.settings.seeds_given,
            noise_origin="statistical-exact" if "noise" in self.settings.seeds_given else "secure-exact",
            versions=versions(),
            ledger=self.folder.ledger.name,
        )

    def finish(self) -> PrivacyStatement:
        """Write the statement, the arrays and the summary, and remove what only an unfinished run needs."""
        self.checkpoints.join()
        plan, statement = self.settings.plan, self.statement()
        write_json(self.folder.privacy, statement.to_json())
        arrays = {name: np.ascontiguousarray(one.numpy()) for name, one in self.arrays.items()}
        save_file(arrays, self.folder.path / ARRAYS)
        summary = {
            "algorithm": plan.name,
            "mechanism": plan.release_name,
            "epsilon": statement.epsilon.upper if self.done else 0.0,
            "delta": plan.delta,
            "noise_multiplier": plan.noise_multiplier,
            "clip_norm": plan.clip_norm,
            "units_per_round": plan.normaliser,
            "rounds": self.done,
        }
        write_json(self.folder.summary, summary)
        self.folder.remove_unfinished()
        return statement

    def _insist(self) -> None:
        """Charge nothing more while what was charged since the last good checkpoint hangs on this process alone."""
        state = self._state()
        try:
            self.checkpoints.insist(state)
        except OSError as error:
            raise self.checkpoints.not_kept(state) from error

    def _state(self) -> Checkpoint:
        arrays = {name: np.array(array) for name, array in self.round.state().items()}
        values = {"ledger_entries": len(self.ledger), "metrics_bytes": self.folder.metrics_size}
        return Checkpoint(round=self.done, arrays=arrays, values=values)

    @contextmanager
    def _written(self) -> Iterator[None]:
        """After it no checkpoint is under way."""
        try:
            yield
        finally:
            self.checkpoints.join()


def _opened(folder: RunFolder) -> Ledger:
    """The ledger of a run to go on with, in a folder that nobody else works in."""
    folder.hold.take("output")
    return Ledger.open(folder.ledger)


def finished(path: Path, settings: Settings, initial: ArrayRecord, layout: ArrayLayout) -> ArrayRecord | None:
    """The arrays of a run that is finished; None of one that is not.

    Raises:
        InvalidInput: It is another run.
    """
    folder = RunFolder(path, new=False)
    if not folder.finished:
        return None
    require_same(folder.read_config()["identity"], settings.identity(layout))
    written = load_file(path / ARRAYS)
    vector = np.concatenate([written[name].astype(np.float64).ravel() for name in layout.shapes])
    return layout.filled(initial, vector)
