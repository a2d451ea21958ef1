"""Does it pay to tune on private data? Private selections against untuned runs, at one ε in total.

python -m benchmarks.tuned shakespeare --corpora FOLDER

Each selection draws how many runs it makes and which settings they have, and releases one model. Beside it stand runs
that spend the whole ε on one setting, each setting of the grid among them, and runs that spend the selection's
computation as well. `account --check` confirms the statement of each. All are measured on the same rows of the same
test users, who take no part in any choice. `table` shows what all have left.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command_line import run_benchmark
from benchmarks.regime.rates import MODEL, RATES
from benchmarks.regime.studies import FILES
from experiments.report.markdown import table
from experiments.sweep.results import contrast
from fedsim.errors import Failure, InvalidInput
from fedsim.versions import versions

GROUP_SIZES = (1, 4)
"""With RATES the grid."""
DEFAULT, PUBLIC = (1, 1e-3), (1, 3e-3)
"""What an untuned run has if nothing is said; and with the learning rate that `benchmarks.regime` finds on public
users."""
DATA = ("--data.source", "files", "--data.sequence-length", "64")
ROWS = 2000
"""Most rows of test users, drawn once."""
SELECTED, UNTUNED, LARGER = "selected", "untuned", "larger"
HEADINGS = ("corpus", "", "models", "gradients each", "ε", "test loss", "± 95 %", "this less the selection's")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One model.

    Attributes:
        corpus: Whose text.
        kind: SELECTED, UNTUNED or LARGER: with as many gradients a round as a selection's runs take together.
        arguments: Of the command that made it, without folders.
        gradients: Gradient evaluations, expected; of a selection, of all its runs.
        epsilon: Certified, in total.
        loss: Of test users, nats a token; infinite where training did not end in a model.
        group_size: G.
        rate: The learning rate.
        date: When.
        versions: Of the packages.
    """

    corpus: str
    kind: str
    arguments: list[str]
    gradients: float
    epsilon: float
    loss: float
    group_size: int
    rate: float
    date: str
    versions: dict[str, str]

    @property
    def setting(self) -> tuple[int, float]:
        return self.group_size, self.rate


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """Make selections and untuned runs of a corpus, or print the table. What is there already is not made again."""

    corpus: str
    """shakespeare or ubuntu-irc, or table."""
    corpora: Path = Path("corpora")
    """The folder of corpora, as for `benchmarks.regime`."""
    output: Path = Path("runs/tuned")
    """Where a line a model is added, in a file a corpus, and read by table."""
    epsilon: float = 8.0
    """User-level ε in total, at δ = 1e-5."""
    gradients: int = 128
    """Gradient evaluations a round."""
    rounds: int = 25
    """Rounds of every run."""
    expected_runs: float = 4.0
    """Of a selection, on average."""
    selections: int = 3
    """How many are made."""
    untuned: int = 1
    """Runs with each setting of the grid; two more with DEFAULT and PUBLIC."""
    larger: int = 2
    """Runs with PUBLIC that take as many gradients as a selection does on average."""

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
        there = [one.arguments for one in read(self.output) if one.corpus == self.corpus]
        wanted = []
        for kind, arguments in self._wanted():
            if arguments in there:
                there.remove(arguments)
            else:
                wanted.append((kind, arguments))
        with ThreadPoolExecutor(2) as both:
            yield from both.map(lambda one: self._outcome(*one), wanted)

    def _wanted(self) -> Iterator[tuple[str, list[str]]]:
        for setting in ((group_size, rate) for group_size in GROUP_SIZES for rate in RATES):
            for _ in range(self.untuned + 2 * (setting in (DEFAULT, PUBLIC))):
                yield UNTUNED, self._train(setting, self.gradients)
        for _ in range(self.larger):
            yield LARGER, self._train(PUBLIC, round(self.gradients * self.expected_runs))
        for _ in range(self.selections):
            yield SELECTED, self._sweep()

    def _train(self, setting: tuple[int, float], gradients: int) -> list[str]:
        group_size, rate = setting
        return [
            *("train", *self._common(gradients), "--evaluation.every", str(self.rounds)),
            *("--plan.group-size", str(group_size), "--optimizer.learning-rate", f"{rate:g}"),
        ]

    def _sweep(self) -> list[str]:
        return [
            *("sweep", "--select", "private", *self._common(self.gradients)),
            *("--selection.expected-runs", f"{self.expected_runs:g}", "--sweep.algorithms", "uls"),
            *("--sweep.uls-group-sizes", *map(str, GROUP_SIZES)),
            *("--sweep.learning-rates", *(f"{rate:g}" for rate in RATES)),
        ]

    def _common(self, gradients: int) -> list[str]:
        plan = {"epsilon": self.epsilon, "delta": 1e-5, "rounds": self.rounds, "gradients-per-round": gradients}
        return [
            *("--engine.kind", "local", "--evaluation.test-rows", "1"),
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
        gradients = float(arguments[arguments.index("--plan.gradients-per-round") + 1]) * self.rounds
        return Outcome(
            corpus=self.corpus,
            kind=kind,
            arguments=arguments,
            gradients=gradients * (self.expected_runs if kind == SELECTED else 1.0),
            epsilon=statement["epsilon"]["upper"],
            loss=math.inf if measured["loss"] is None else measured["loss"],
            group_size=statement["contribution_bound"]["group_size"],
            rate=_rate(made, statement),
            date=datetime.now(UTC).date().isoformat(),
            versions={name: value for name, value in versions().items() if name != "platform"},
        )


def _rate(made: Path, statement: dict[str, Any]) -> float:
    if "selection" in statement:
        return float(statement["selection"]["selected"]["learning_rate"])
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    return float(config["config"]["optimizer.learning-rate"])


def read(folder: Path) -> Iterator[Outcome]:
    """The lines of all corpora."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield Outcome(**json.loads(line))


def comparison(outcomes: Sequence[Outcome]) -> str:
    """The table: mean losses, and by how much the selection's is lower; of the kinds that there are."""
    rows = []
    for corpus in sorted({one.corpus for one in outcomes}):
        own = [one for one in outcomes if one.corpus == corpus]
        selected = _losses([one for one in own if one.kind == SELECTED])
        for title, strata in _groups(own):
            models = [one for stratum in strata for one in stratum]
            samples, shares = [_losses(stratum) for stratum in strata], [1 / len(strata)] * len(strata)
            loss, half = contrast(samples, shares)
            lead = ""
            if models[0].kind != SELECTED and len(selected):
                lead = _interval(*contrast([*samples, selected], [*shares, -1.0]), "+.3f")
            rows.append(
                [
                    *(corpus, title, str(len(models)), f"{models[0].gradients:,.0f}"),
                    *(f"{max(one.epsilon for one in models):.3f}", f"{loss:.3f}"),
                    *("–" if half is None else f"{half:.3f}", lead),
                ]
            )
    return table(HEADINGS, rows)


def _groups(own: Sequence[Outcome]) -> Iterator[tuple[str, list[list[Outcome]]]]:
    """Rows of the table: a title, and the models by setting, which count alike however many each has."""
    by_kind = {kind: [one for one in own if one.kind == kind] for kind in (SELECTED, UNTUNED, LARGER)}
    by_setting: dict[tuple[int, float], list[Outcome]] = {}
    for one in by_kind[UNTUNED]:
        by_setting.setdefault(one.setting, []).append(one)
    if by_kind[SELECTED]:
        chosen = sorted(one.setting for one in by_kind[SELECTED])
        yield "private selection: " + "; ".join(f"G = {g}, {rate:g}" for g, rate in chosen), [by_kind[SELECTED]]
    titles = {DEFAULT: "one run, the defaults", PUBLIC: "one run, the rate of public users"}
    for setting, title in titles.items():
        if setting in by_setting:
            yield f"{title}: G = {setting[0]}, {setting[1]:g}", [by_setting[setting]]
    if by_setting:
        yield "one run, a guess: any of the grid", list(by_setting.values())
    if by_kind[LARGER]:
        yield f"one run, all computation: G = {PUBLIC[0]}, {PUBLIC[1]:g}", [by_kind[LARGER]]


def _losses(outcomes: Sequence[Outcome]) -> np.ndarray:
    return np.array([one.loss for one in outcomes])


def _interval(value: float, half: float | None, form: str) -> str:
    return format(value, form) + ("" if half is None else f" ± {half:.3f}")


def _call(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, "-m", "experiments.run", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"fedsim {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(run_benchmark(Tuned, positional=True))
