"""Learning rates, chosen on public users before any private user is looked at.

The modules of Python's standard library are users nobody needs to protect, about as many as Shakespeare has roles. The
rate that does best for them, with ULS and one seed, is the one that private users' runs are given, whatever algorithm
and group size these have, and though there is less noise among more users at the same compute and ε.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.regime.kept import Shelf

MODEL = "model_stories260k"
"""The model that is fine-tuned, in the folder of corpora."""
RATES = (1e-3, 3e-3, 1e-2)
"""Learning rates that are tried."""
AT_THE_END = "500"
"""Rounds between evaluations: more than any pilot has."""
GROUP_SIZE = 4
"""Examples of a public user each round."""
PUBLIC = ("--data.source", "docstrings", "--data.packages", "standard-library", "--data.sequence-length", "64")


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """A sweep over learning rates on public users.

    Attributes:
        gradients: B, gradient evaluations a round.
        rounds: T.
        epsilons: User-level ε.
        longer: Whether longer studies alone have as many rounds.
    """

    gradients: int
    rounds: int
    epsilons: tuple[float, ...]
    longer: bool = False

    @property
    def name(self) -> str:
        """Its folder's."""
        return f"public-B{self.gradients}-T{self.rounds}"

    @property
    def reads(self) -> tuple[str, ...]:
        """Of the folder of corpora."""
        return (MODEL,)

    def arguments(self, corpora: Path, output: Path) -> list[str]:
        """Of the command line, after the program's name."""
        return [
            *("sweep", *PUBLIC, "--model.path", str(corpora / MODEL), "--plan.delta", "1e-5"),
            *("--plan.rounds", str(self.rounds)),
            *("--optimizer.name", "adam", "--evaluation.every", AT_THE_END),
            *("--evaluation.max-rows", "300", "--evaluation.test-rows", "1000", "--sweep.no-nonprivate"),
            *("--sweep.algorithms", "uls", "--sweep.uls-group-sizes", str(GROUP_SIZE), "--sweep.seeds", "1"),
            *("--sweep.compute", str(self.gradients), "--sweep.epsilons", *(f"{value:g}" for value in self.epsilons)),
            *("--sweep.learning-rates", *(f"{value:g}" for value in RATES), "--output", str(output / self.name)),
        ]


PILOTS = (
    Pilot(gradients=1024, rounds=25, epsilons=(1, 8)),
    Pilot(gradients=256, rounds=25, epsilons=(2, 8)),
    Pilot(gradients=128, rounds=50, epsilons=(8,), longer=True),
    Pilot(gradients=64, rounds=100, epsilons=(8,), longer=True),
)


@dataclass(frozen=True)
class Rates:
    """The best rate of each pilot, by (gradients a round, rounds, ε)."""

    best: dict[tuple[int, int, float], float]

    @classmethod
    def read(cls, shelf: Shelf) -> "Rates":
        """From the pilots, of which those of longer studies alone may be missing."""
        best: dict[tuple[int, int, float], float] = {}
        for pilot in PILOTS:
            kept = shelf.find(pilot)
            assert kept is not None or pilot.longer
            for cell in kept.cells() if kept is not None else ():
                best[pilot.gradients, pilot.rounds, cell["epsilon"]] = cell["best"]["learning_rate"]
        return cls(best)

    def at(self, gradients: int, rounds: int, epsilon: float) -> float:
        """The rate of the pilot that is nearest in rounds, then compute, then ε, each by its ratio."""

        def distance(tried: tuple[int, int, float]) -> tuple[float, ...]:
            return tuple(abs(math.log(own / asked)) for own, asked in zip(_order(*tried), asked_for, strict=True))

        asked_for = _order(gradients, rounds, epsilon)
        return self.best[min(self.best, key=distance)]

    def rows(self) -> Iterator[list[str]]:
        """Of a table: compute, rounds, ε, rate."""
        for (gradients, rounds, epsilon), rate in sorted(self.best.items()):
            yield [f"{gradients:,}", str(rounds), f"{epsilon:g}", f"{rate:g}"]


def _order(gradients: int, rounds: int, epsilon: float) -> tuple[float, float, float]:
    return float(rounds), float(gradients), epsilon
