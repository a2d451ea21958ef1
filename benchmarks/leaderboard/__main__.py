"""The command: check entries, make one, print the table, run an entry again, or write down what a task is made of."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from benchmarks.leaderboard.check import check
from benchmarks.leaderboard.enter import Submission, entry_of, keep
from benchmarks.leaderboard.entry import FOLDER, Chosen, Entry, read_entry
from benchmarks.leaderboard.reproduce import faults, reproduce
from benchmarks.leaderboard.table import BEGIN, END, tables
from benchmarks.leaderboard.tasks import Files, Opened, keep_figures, task_named
from benchmarks.marked import replace_between_marks
from experiments.command_line.options import Unreadable, read_options
from fedsim.errors import Failure, InvalidInput
from fedsim.privacy.bounds import shown_above, shown_below
from fedsim.resources import open_resources
from fedsim.validation import require_at_least


@dataclass(frozen=True, kw_only=True)
class Check:
    """Compute every entry's ε from its event, confirm it by a second method, and compare the rest with its task."""

    entries: Positional[tuple[Path, ...]] = ()
    """Files; by default all that are kept."""

    def run(self) -> int:
        """1 where an entry does not stand."""
        code = 0
        for path in self.entries or _kept():
            checked = check(read_entry(path))
            for fault in checked.faults:
                print(f"{path.name}: refused: {fault}")
            if checked.bounds is not None and not checked.faults:
                low, high = shown_below(checked.bounds.lower), shown_above(checked.bounds.upper)
                print(f"{path.name}: stands: ε in [{low}, {high}], certified, and confirmed by a second method")
            code |= bool(checked.faults)
        return code


@dataclass(frozen=True, kw_only=True)
class Enter:
    """Make an entry from finished runs that differ in their seeds alone, from what a private selection released, or
    from a model that something else trained."""

    folders: Positional[tuple[Path, ...]]
    """Folders of runs of `fedsim train`, a selection's `selected`, or with --event models in Hugging Face's form."""
    task: str
    """The task's name."""
    who: str
    """Who did it."""
    title: str
    """What was done, in a few words."""
    chosen: Chosen
    """How the settings came about. Chosen by results on the task's own users they must be charged."""
    link: str = ""
    """Where it is described; needed with --words."""
    words: str | None = None
    """How it was made, where no arguments of `fedsim train` with both seeds say so."""
    event: Path | None = None
    """A file of the event's JSON, for a model that something else trained."""
    data: str | None = None
    """The task's text, where it is fetched and the folders are no runs of `fedsim train`."""
    model: str | None = None
    """The task's base model, likewise."""
    output: Path = FOLDER
    """The folder that gets the entry."""

    def run(self) -> int:
        """0; what is no entry is refused."""
        said = Submission(
            task=self.task,
            title=self.title,
            who=self.who,
            link=self.link,
            chosen=self.chosen,
            words=self.words,
            event=self.event,
            files=Files(data=self.data, model=self.model),
        )
        entry = entry_of(self.folders, said)
        print(f"{keep(entry, self.output)}: loss {entry.loss:.4f}, ε {shown_above(entry.epsilon)}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Table:
    """Print the table of the entries that stand."""

    page: Path | None = None
    """A page whose part between the table's marks is written anew."""

    def run(self) -> int:
        """0, where all kept entries stand."""
        text = tables(_standing(_kept()))
        if self.page is None:
            print(text)
        else:
            replace_between_marks(self.page, BEGIN, END, text)
        return 0


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Run an entry's command again, and compare ε and loss with what it says."""

    entry: Positional[Path]
    """Its file."""
    data: str | None = None
    """The task's text, where it is fetched."""
    model: str | None = None
    """The task's base model, likewise."""
    runs: int = 1
    """How many of the entry's runs, the first ones."""

    def run(self) -> int:
        """1 where something differs by more than it may."""
        require_at_least("runs", self.runs, 1)
        entry, code = read_entry(self.entry), 0
        for run, outcome in reproduce(entry, Files(data=self.data, model=self.model), self.runs):
            found = faults(entry, run, outcome)
            for fault in found:
                print(f"{self.entry.name}: not reproduced: {fault}")
            if not found:
                print(
                    f"{self.entry.name}: reproduced: loss {outcome.loss:.6f}, entered {run.loss:.6f}, may differ by "
                    f"{outcome.tolerance:g}; ε {shown_above(outcome.epsilon)}"
                )
            if outcome.differences:
                print(f"{self.entry.name}: here are {'; '.join(outcome.differences)}")
            code |= bool(found)
        return code


@dataclass(frozen=True, kw_only=True)
class TaskFigures:
    """Write down what a task's text and base model come to here, for whoever adds a task or renews one.

    Entries of a task whose text or base model changed no longer pass their check, and must be made again.
    """

    name: Positional[str]
    """The task's name."""
    data: str | None = None
    """Its text, where it is fetched."""
    model: str | None = None
    """Its base model, likewise."""

    def run(self) -> int:
        """0."""
        task = task_named(self.name)
        found = Opened(task, open_resources(task.config(Files(data=self.data, model=self.model)))).found()
        keep_figures(task.name, found)
        print(f"{task.name}: content {found.content[:12]}, base {found.weights[:12]}, loss {found.base_loss:.4f}")
        return 0


COMMANDS: dict[str, Any] = {
    "check": Check,
    "enter": Enter,
    "table": Table,
    "reproduce": Reproduce,
    "task": TaskFigures,
}


def _kept() -> tuple[Path, ...]:
    return tuple(sorted(FOLDER.glob("*.json")))


def _standing(paths: Sequence[Path]) -> dict[Path, Entry]:
    """The entries of these files.

    Raises:
        Failure: One of them does not stand.
    """
    entries = {path: read_entry(path) for path in paths}
    for path, entry in entries.items():
        if found := check(entry).faults:
            raise Failure(f"{path.name} is no entry: {'; '.join(found)}.")
    return entries


def main(arguments: Sequence[str]) -> int:
    """The command line: 0 done, 1 something does not stand or failed, 2 bad input."""
    name, *rest = arguments or ["--help"]
    if name not in COMMANDS:
        print(f"usage: python -m benchmarks.leaderboard {'|'.join(COMMANDS)} [options]", file=sys.stderr)
        return 0 if name in ("-h", "--help") else 2
    try:
        program = f"python -m benchmarks.leaderboard {name}"
        options = read_options(COMMANDS[name], rest, program=program, default=None)
        return int(options.run())
    except (InvalidInput, Unreadable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Failure as failure:
        print(f"failed: {failure}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
