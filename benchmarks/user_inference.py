"""Do fine-tuned models know their training users from others? Private and non-private ones, on three corpora.

python -m benchmarks.user_inference --corpora FOLDER

Of each corpus a few users are trained on, many times each, which is where models leak most, and many are held out. All
models of a corpus have the same users, rounds and gradients. The attack scores a user by how far training lowered the
loss of its text. Ends with a table and one JSON line. Models that are finished are not made again.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.command_line import run_benchmark
from benchmarks.regime.kept import CORPORA, digest_of
from benchmarks.regime.rates import MODEL
from benchmarks.regime.studies import FILES
from experiments.audit.membership import UserInference, infer_users
from experiments.report.markdown import table
from fedsim.config import RunConfig
from fedsim.errors import Failure, InvalidInput
from fedsim.versions import versions
from server.identity import stored_config
from server.results.run_folder import RunFolder, write_json

SHARES = {"shakespeare": 0.08, "ubuntu-irc": 0.006, "rails-commits": 0.016}
"""Share of each corpus' users that is trained on: some 100; all others but a few are held out."""
VALIDATION = 0.005
OWN_OPTIONS = {"rails-commits": ("--data.owners-column", "owner_ids")}
HEADINGS = ("corpus", "ε, certified", "held-out loss", "AUC", "true positives at 1 % false ones", "users in, out")
SEED = 1
"""Of sampling, noise and the choice of users to attack."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model that was attacked.

    Attributes:
        corpus: Whose text.
        epsilon: What was asked for; infinite without privacy.
        epsilon_certified: The upper bound of the statement; None without privacy.
        loss_before: Of held-out users under the model that training started from, nats a token.
        loss: Under the trained one; None where it is no number.
        area: AUC, and its interval.
        found: True positive rate at 1 % false positives, and its interval.
        users: Training and held-out users that were scored.
        arguments: Of the command that trained it, with the corpora in CORPORA.
        content: SHA-256 of the text and of the model it started from.
        date: When.
        versions: Of the packages.
    """

    corpus: str
    epsilon: float
    epsilon_certified: float | None
    loss_before: float
    loss: float | None
    area: tuple[float, float, float]
    found: tuple[float, float, float]
    users: tuple[int, int]
    arguments: list[str]
    content: list[str]
    date: str
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Train private and non-private models of each corpus, attack them, and print the table."""

    corpora: Path
    """The folder of corpora, as for `benchmarks.regime`."""
    output: Path = Path("runs/user-inference")
    """Where runs go, a folder each, and beside each what is kept of it."""
    only: tuple[str, ...] = tuple(FILES)
    """Which corpora."""
    epsilons: tuple[float, ...] = (math.inf, 8.0, 2.0)
    """User-level ε, at δ = 1e-5; inf without privacy."""
    gradients: int = 128
    """Gradient evaluations a round."""
    group_size: int = 4
    """Examples that a user draws in each round it is in."""
    rounds: int = 40
    """Of each run."""
    learning_rate: float = 3e-3
    """Of Adam."""
    users: int = 200
    """Training and held-out users that are scored, each at most."""

    def run(self) -> None:
        """Make what is missing, and print.

        Raises:
            InvalidInput: For an unknown corpus, or a folder without it.
            Failure: Where training fails.
        """
        for corpus in self.only:
            if corpus not in SHARES:
                raise InvalidInput("only", corpus, "some of " + ", ".join(SHARES))
            for needed in (MODEL, FILES[corpus]):
                if not (self.corpora / needed).exists():
                    raise InvalidInput("corpora", str(self.corpora), f"a folder that has {needed}")
        points = [self._point(corpus, epsilon) for corpus in self.only for epsilon in self.epsilons]
        print(markdown(points))
        print(json.dumps({"benchmark": "user_inference", "points": [dict(brief(point)) for point in points]}))

    def _point(self, corpus: str, epsilon: float) -> Point:
        """What is kept of a model; it is made and attacked where there is nothing of the same arguments and text."""
        folder = self.output / f"{corpus}-{epsilon:g}"
        path = folder.with_name(f"{folder.name}.json")
        arguments = self._arguments(corpus, epsilon, CORPORA)
        content = [digest_of(self.corpora / one) for one in (FILES[corpus], MODEL)]
        if path.exists():
            point = Point(**json.loads(path.read_text(encoding="utf-8")))
            if (point.arguments, point.content) == (arguments, content):
                return point
        run = RunFolder(self._trained(folder, self._arguments(corpus, epsilon, self.corpora)))
        config: RunConfig = stored_config(RunConfig, _read(run.config), str(run.path))
        attack = infer_users(config, run, users=self.users, delta=config.plan.delta, confidence=0.95, seed=SEED)
        point = self._of_run(corpus, epsilon, run, attack, arguments, content)
        write_json(path, asdict(point))
        return point

    def _arguments(self, corpus: str, epsilon: float, corpora: Path) -> list[str]:
        private = () if math.isfinite(epsilon) else ("--plan.allow-no-privacy",)
        held_out = 1 - SHARES[corpus] - VALIDATION
        return [
            *("train", "--data.source", "files", "--data.path", str(corpora / FILES[corpus])),
            *OWN_OPTIONS.get(corpus, ()),
            *("--data.sequence-length", "32", "--data.long-texts", "truncate"),
            *("--data.validation-fraction", f"{VALIDATION:g}"),
            *("--data.test-fraction", f"{held_out:g}", "--model.path", str(corpora / MODEL)),
            *("--plan.epsilon", f"{epsilon:g}", *private, "--plan.delta", "1e-5", "--plan.rounds", str(self.rounds)),
            *("--plan.group-size", str(self.group_size), "--plan.gradients-per-round", str(self.gradients)),
            *("--optimizer.name", "adam", "--optimizer.learning-rate", f"{self.learning_rate:g}"),
            *("--engine.kind", "local", "--evaluation.every", str(self.rounds), "--evaluation.max-rows", "20"),
            *("--evaluation.test-rows", "500", "--sampling-seed", str(SEED), "--noise-seed", str(SEED)),
        ]

    def _trained(self, folder: Path, arguments: Sequence[str]) -> Path:
        """The folder of a run that has just been made."""
        made = folder.with_name(f"{folder.name}-{datetime.now(UTC):%Y%m%d%H%M%S%f}")
        command = [sys.executable, "-m", "experiments.run", *arguments, "--output", str(made)]
        print(f"{folder.name}: training", file=sys.stderr, flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Failure(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
        return made

    def _of_run(
        self,
        corpus: str,
        epsilon: float,
        run: RunFolder,
        attack: UserInference,
        arguments: list[str],
        content: list[str],
    ) -> Point:
        summary, statement = _read(run.path / "summary.json"), _read(run.privacy)
        return Point(
            corpus=corpus,
            epsilon=epsilon,
            epsilon_certified=statement["epsilon"]["upper"] if math.isfinite(epsilon) else None,
            loss_before=summary["test_loss_before"],
            loss=summary["test_loss_after"],
            area=(attack.area.area, attack.area.lower, attack.area.upper),
            found=(attack.found.rate, attack.found.lower, attack.found.upper),
            users=attack.users,
            arguments=arguments,
            content=content,
            date=datetime.now(UTC).date().isoformat(),
            versions={name: value for name, value in versions().items() if name != "platform"},
        )


def markdown(points: Sequence[Point]) -> str:
    """The table, a row a model."""
    rows = []
    for one in points:
        loss = "–" if one.loss is None else f"{one.loss:.3f}"
        rows.append(
            [
                *(one.corpus, "none" if one.epsilon_certified is None else f"{one.epsilon_certified:.2f}"),
                *(f"{one.loss_before:.3f} → {loss}", "{:.3f} ({:.3f} to {:.3f})".format(*one.area)),
                *("{:.1%} ({:.1%} to {:.1%})".format(*one.found), f"{one.users[0]}, {one.users[1]}"),
            ]
        )
    return table(HEADINGS, rows)


def brief(point: Point) -> Iterator[tuple[str, Any]]:
    """What of a point is printed."""
    for name in ("corpus", "epsilon_certified", "loss_before", "loss", "users"):
        yield name, getattr(point, name)
    for name in ("area", "found"):
        yield name, [round(value, 4) for value in getattr(point, name)]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(run_benchmark(Table))
