"""Does it pay to tune on private data? Private selections against untuned runs, at one ε in total.

python -m benchmarks.tuned shakespeare --corpora FOLDER

Each selection draws how many runs it makes and which settings they have, and releases one model, whose statement
`account --check` confirms. Beside it stand runs that spend the whole ε on one setting: the defaults, and each of the
grid, which is what a guess gets on average. All are measured on the same rows of the same test users. `table` prints
what all have left.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.regime.rates import MODEL
from benchmarks.regime.studies import FILES
from experiments.report.markdown import table
from experiments.sweep.results import contrast, half_width
from fedsim.errors import Failure, InvalidInput
from fedsim.versions import versions

GROUP_SIZES, RATES = (1, 4), (1e-3, 3e-3, 1e-2)
"""The grid."""
DATA = ("--data.source", "files", "--data.sequence-length", "64")
ROWS = 2000
"""Most rows of test users, drawn once."""
SELECTED, DEFAULTS, GUESSED = "selected", "defaults", "guessed"
TITLES = {SELECTED: "private selection", DEFAULTS: "one run, the defaults", GUESSED: "one run, a guess of the grid"}
HEADINGS = ("corpus", "", "models", "test loss", "± 95 %", "worst", "this less the selection's")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One model.

    Attributes:
        corpus: Whose text.
        kind: SELECTED, DEFAULTS or GUESSED.
        arguments: Of the command that made it, without folders.
        epsilon: Certified, in total, at δ = 1e-5.
        loss: Of test users, nats a token.
        setting: Group size and learning rate.
        date: When.
        versions: Of the packages.
    """

    corpus: str
    kind: str
    arguments: list[str]
    epsilon: float
    loss: float
    setting: str
    date: str
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """Make selections and untuned runs of a corpus, or print the table."""

    corpus: str
    """shakespeare or ubuntu-irc, or table."""
    corpora: Path = Path("corpora")
    """The folder of corpora, as for `benchmarks.regime`."""
    output: Path = Path("runs/tuned")
    """Where a line a model is added, in a file a corpus, and read by table."""
    epsilon: float = 8.0
    """User-level ε in total, at δ = 1e-5."""
    gradients: int = 256
    """Gradient evaluations a round."""
    rounds: int = 25
    """Rounds of every run."""
    expected_runs: float = 4.0
    """Of a selection, on average."""
    selections: int = 4
    """How many are made."""
    defaults: int = 4
    """Untuned runs with the defaults."""
    guesses: int = 1
    """Untuned runs with each setting of the grid."""

    def run(self) -> None:
        """Add lines, or print the table.

        Raises:
            InvalidInput: For an unknown corpus, or a folder without it.
            Failure: Where a command fails.
        """
        if self.corpus == "table":
            print(comparison(list(read(self.output))))
            return
        if self.corpus not in ("shakespeare", "ubuntu-irc"):
            raise InvalidInput("corpus", self.corpus, "shakespeare, ubuntu-irc or table")
        for needed in (MODEL, FILES[self.corpus]):
            if not (self.corpora / needed).exists():
                raise InvalidInput("corpora", str(self.corpora), f"a folder that has {needed}")
        self.output.mkdir(parents=True, exist_ok=True)
        for outcome in self._outcomes():
            with (self.output / f"{self.corpus}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            print(json.dumps(asdict(outcome)), flush=True)

    def _outcomes(self) -> Iterator[Outcome]:
        untuned = [(DEFAULTS, self._train())] * self.defaults
        for group_size in GROUP_SIZES:
            for rate in RATES:
                setting = ["--plan.group-size", str(group_size), "--optimizer.learning-rate", f"{rate:g}"]
                untuned += [(GUESSED, self._train() + setting)] * self.guesses
        with ThreadPoolExecutor(2) as both:
            yield from both.map(lambda one: self._outcome(*one), untuned)
        for _ in range(self.selections):
            yield self._outcome(SELECTED, self._sweep())

    def _train(self) -> list[str]:
        return ["train", *self._common(), "--evaluation.every", str(self.rounds), "--engine.kind", "local"]

    def _sweep(self) -> list[str]:
        return [
            *("sweep", "--select", "private", *self._common()),
            *("--selection.expected-runs", f"{self.expected_runs:g}", "--sweep.algorithms", "uls"),
            *("--sweep.uls-group-sizes", *map(str, GROUP_SIZES)),
            *("--sweep.learning-rates", *(f"{rate:g}" for rate in RATES)),
        ]

    def _common(self) -> list[str]:
        plan = {"epsilon": self.epsilon, "delta": 1e-5, "rounds": self.rounds, "gradients-per-round": self.gradients}
        return [
            *("--evaluation.test-rows", "1"),
            *(word for name, value in plan.items() for word in (f"--plan.{name}", f"{value:g}")),
        ]

    def _outcome(self, kind: str, arguments: list[str]) -> Outcome:
        """Run a command, have its statement confirmed, and measure its model."""
        folder = self.output / f"{self.corpus}-{datetime.now(UTC):%H%M%S%f}"
        data = [*DATA, "--data.path", str(self.corpora / FILES[self.corpus])]
        _call([*arguments, *data, "--model.path", str(self.corpora / MODEL), "--output", str(folder)])
        made = folder / "selected" if kind == SELECTED else folder
        _call(["account", "--check", str(made)])
        measured = json.loads(_call(["evaluate", str(made / "model"), *data, "--max-rows", str(ROWS), "--json"]))
        statement = json.loads((made / "privacy.json").read_text(encoding="utf-8"))
        return Outcome(
            corpus=self.corpus,
            kind=kind,
            arguments=arguments,
            epsilon=statement["epsilon"]["upper"],
            loss=measured["loss"],
            setting=_setting(made, statement),
            date=datetime.now(UTC).date().isoformat(),
            versions={name: value for name, value in versions().items() if name != "platform"},
        )


def _setting(made: Path, statement: dict[str, Any]) -> str:
    if "selection" in statement:
        rate = statement["selection"]["selected"]["learning_rate"]
    else:
        config = json.loads((made / "config.json").read_text(encoding="utf-8"))
        rate = config["config"]["optimizer.learning-rate"]
    return f"G = {statement['contribution_bound']['group_size']}, {rate:g}"


def read(folder: Path) -> Iterator[Outcome]:
    """The lines of all corpora."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield Outcome(**json.loads(line))


def comparison(outcomes: list[Outcome]) -> str:
    """The table: mean losses, and by how much the selection's is lower."""
    rows = []
    for corpus in sorted({one.corpus for one in outcomes}):
        losses = {
            kind: np.array([one.loss for one in outcomes if (one.corpus, one.kind) == (corpus, kind)])
            for kind in TITLES
        }
        for kind, title in TITLES.items():
            own, half = losses[kind], half_width(losses[kind])
            nats, width = contrast([own, losses[SELECTED]], [1, -1])
            lead = "" if kind == SELECTED else f"{nats:+.3f}" + ("" if width is None else f" ± {width:.3f}")
            spread = "–" if half is None else f"{half:.3f}"
            rows.append([corpus, title, str(len(own)), f"{own.mean():.3f}", spread, f"{own.max():.3f}", lead])
    return table(HEADINGS, rows)


def _call(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, "-m", "experiments.run", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"fedsim {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    try:
        tyro.cli(Tuned, config=(tyro.conf.PositionalRequiredArgs,)).run()
    except (Failure, InvalidInput) as error:
        print(f"{error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InvalidInput) else 1)
