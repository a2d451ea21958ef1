"""Running an entry's command again, and comparing what comes out with what it says."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.leaderboard.arguments import config_of
from benchmarks.leaderboard.check import ADJACENCY, check
from benchmarks.leaderboard.entry import Entry, Run
from benchmarks.leaderboard.tasks import Files, Opened, Task, task_named
from experiments.loading import loaded_for_use
from fedsim.errors import Failure, InvalidInput
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import from_json
from fedsim.versions import versions

SAME = 0.001
"""Nats between two runs of the same command on the same versions and base model: rounding alone parts them."""
OTHERWISE = 0.03
"""Nats where versions or the base model are others: what other seeds make of one command (docs/leaderboard.md)."""
EPSILON = 1e-3
"""Relative, between the ε of two versions: the tolerance to which the accountant bounds it."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What running a command again gave.

    Attributes:
        loss: Nats a token on the task's test rows.
        epsilon: Certified upper bound for what its ledger holds.
        differences: Versions that are others than the entry's, and the base model where it is, as words.
    """

    loss: float
    epsilon: float
    differences: tuple[str, ...]

    @property
    def tolerance(self) -> float:
        """How far its loss may be from the entry's."""
        return OTHERWISE if self.differences else SAME


def command(entry: Entry, run: Run, task: Task, files: Files, output: Path) -> list[str]:
    """Arguments of fedsim that make one of an entry's runs: held-out users are looked at as little as can be."""
    if entry.arguments is None:
        hint = f"It was made so: {entry.words}. See {entry.link}."
        raise InvalidInput("entry", entry.title, "one that fedsim's own arguments made", hint)
    rounds = config_of(entry.arguments, task).plan.rounds
    options = {
        **task.options,
        **({"data.path": files.data, "model.path": files.model} if task.fetched else {}),
        "engine.kind": "local",
        "evaluation.every": rounds,
        "evaluation.max-rows": 1,
        "evaluation.test-rows": 1,
        "sampling-seed": run.sampling_seed,
        "noise-seed": run.noise_seed,
        "output": output,
    }
    return [*entry.arguments, *(part for name, value in options.items() for part in (f"--{name}", str(value)))]


def reproduce(entry: Entry, files: Files, runs: int) -> Iterator[tuple[Run, Outcome]]:
    """Train again for each of the entry's first runs, and measure what came out.

    Raises:
        InvalidInput: No command of fedsim made the entry, or text or base model are not the task's.
        Failure: The entry does not pass its check, or a training ends with an error.
    """
    task = task_named(entry.task)
    if faults := check(entry).faults:
        raise Failure(f"{entry.title} is no entry: {'; '.join(faults)}.")
    opened = Opened.of(task, files)
    differences = tuple(_differences(entry, opened))
    for run in entry.runs[:runs]:
        with tempfile.TemporaryDirectory(prefix="leaderboard-") as work:
            folder = Path(work) / "run"
            _train(command(entry, run, task, files, folder))
            event = from_json(json.loads((folder / "privacy.json").read_text(encoding="utf-8"))["event"])
            yield (
                run,
                Outcome(
                    loss=opened.loss(loaded_for_use(str(folder / "model"))),
                    epsilon=epsilon_bounds(event, task.delta, adjacency=ADJACENCY).upper,
                    differences=differences,
                ),
            )


def faults(entry: Entry, run: Run, outcome: Outcome) -> list[str]:
    """What of an outcome is not what the entry says, in sentences."""
    found = []
    if outcome.epsilon > entry.epsilon * (1 + EPSILON):
        found.append(f"ε is {outcome.epsilon:.6g}, and the entry says {entry.epsilon:.6g}")
    if abs(outcome.loss - run.loss) > outcome.tolerance:
        found.append(
            f"the loss is {outcome.loss:.4f}, and the entry says {run.loss:.4f}: they may differ by "
            f"{outcome.tolerance:g}"
        )
    return found


def _differences(entry: Entry, opened: Opened) -> Iterator[str]:
    here = versions()
    for name, said in entry.versions.items():
        if here.get(name) != said:
            yield f"{name} {here.get(name)}, not {said}"
    if opened.resources.weights != entry.weights:
        yield f"a base model made here, with a loss of {opened.base_loss:.4f}, not {entry.base_loss:.4f}"


def _train(arguments: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "experiments.run", *arguments], check=False)
    if done.returncode:
        raise Failure(f"fedsim train ended with {done.returncode}")
