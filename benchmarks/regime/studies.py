"""What is asked, and the sweeps that answer it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks.regime.rates import MODEL, Rates
from benchmarks.regime.synthetic import BOOKS, SyntheticUsers

Corpus = Literal[
    "shakespeare",
    "ubuntu-irc",
    "rails-commits",
    "shakespeare-alike",
    "shakespeare-mixed",
    "synthetic-alike",
    "synthetic-mixed",
]
FILES: dict[str, str] = {
    "shakespeare": "shakespeare/shakespeare.parquet",
    "ubuntu-irc": "ubuntu_irc/ubuntu_irc.parquet",
    "rails-commits": "rails_commits/rails_commits.parquet",
}
"""Where each real corpus lies in the folder of corpora; each is a preset of the same name."""
REGROUPED = {"shakespeare-alike": ("shakespeare", "alike"), "shakespeare-mixed": ("shakespeare", "mixed")}
"""Real corpora whose rows are dealt out anew, and how (`--data.regroup`)."""
SYNTHETIC: dict[str, SyntheticUsers] = {
    "synthetic-alike": SyntheticUsers(diversity=0.0),
    "synthetic-mixed": SyntheticUsers(diversity=1.0),
}
"""Populations that the study makes up itself."""
SYNTHETIC_OPTIONS = (
    *("--data.source", "files", "--data.sequence-length", "64", "--plan.delta", "1e-5", "--optimizer.name", "adam"),
    *("--evaluation.max-rows", "300", "--evaluation.test-rows", "1000"),
)
"""As the presets of the real corpora have them."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """How the compute of a run is split.

    Attributes:
        gradients: B, gradient evaluations a round.
        rounds: T.
    """

    gradients: int
    rounds: int

    def __str__(self) -> str:
        return f"B{self.gradients}-T{self.rounds}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, and the points that answer it.

    Attributes:
        name: A folder's name.
        asks: The question, in words.
        corpus: The users.
        places: How the compute is split; each is a sweep, or several where learning rates differ.
        epsilons: User-level ε.
        uls, els: Group sizes of each; none leaves the algorithm out.
        bands: Over how many rounds noise is correlated.
        seeds: Of the best setting of each arm.
        longer: Whether it is left out unless longer studies are asked for.
    """

    name: str
    asks: str
    corpus: Corpus
    places: tuple[Place, ...]
    epsilons: tuple[float, ...]
    uls: tuple[int, ...] = ()
    els: tuple[int, ...] = ()
    bands: tuple[str, ...] = ("1",)
    seeds: int = 3
    longer: bool = False


AT_256, AT_1024 = Place(gradients=256, rounds=25), Place(gradients=1024, rounds=25)
QUESTIONS_OF_DIVERSITY: dict[Corpus, str] = {
    "shakespeare-alike": "Is the lead of ULS smaller where each role's speeches are alike?",
    "shakespeare-mixed": "And larger where they are as different as anybody's?",
    "synthetic-alike": "Is ELS level for 20,000 users of whom each repeats one passage?",
    "synthetic-mixed": "And does ULS lead for as many whose examples are anybody's?",
}
"""Asked with the same settings of each corpus."""
STUDIES: tuple[Study, ...] = (
    Study(
        name="shakespeare-epsilon",
        asks="Does ULS lead, by more under stronger privacy, and which group size wins?",
        corpus="shakespeare",
        places=(AT_1024,),
        epsilons=(0.5, 2, 8),
        uls=(1, 4, 16),
        els=(1, 4),
    ),
    Study(
        name="shakespeare-compute",
        asks="Does the lead of ULS, and the group size that wins, grow with compute?",
        corpus="shakespeare",
        places=(Place(gradients=64, rounds=25), AT_256),
        epsilons=(2,),
        uls=(1, 4, 16),
        els=(1, 4),
    ),
    Study(
        name="irc-allocation",
        asks="Which split of the same compute into cohort and rounds wins, with and without bands?",
        corpus="ubuntu-irc",
        places=(
            Place(gradients=64, rounds=100),
            Place(gradients=128, rounds=50),
            AT_256,
        ),
        epsilons=(8,),
        uls=(1,),
        bands=("1", "auto"),
        longer=True,
    ),
    Study(
        name="irc",
        asks="Does ULS lead among many users with few, short messages?",
        corpus="ubuntu-irc",
        places=(AT_256,),
        epsilons=(2,),
        uls=(1, 4),
        els=(1, 4),
    ),
    Study(
        name="rails",
        asks="And with a classifier, among users of whom half own one example?",
        corpus="rails-commits",
        places=(AT_256,),
        epsilons=(2,),
        uls=(1, 4),
        els=(1, 4),
    ),
    *(
        Study(
            name=corpus,
            asks=asks,
            corpus=corpus,
            places=(AT_1024,),
            epsilons=(2,),
            uls=(1, 8),
            els=(1, 4),
            longer=True,
        )
        for corpus, asks in QUESTIONS_OF_DIVERSITY.items()
    ),
    Study(
        name="shakespeare-largest",
        asks="And at twice and nearly four times as many gradients a round as there are users?",
        corpus="shakespeare",
        places=(Place(gradients=2048, rounds=25), Place(gradients=4096, rounds=25)),
        epsilons=(2,),
        uls=(1, 4, 16),
        els=(1, 4),
        longer=True,
    ),
    Study(
        name="shakespeare-weak",
        asks="Is ELS ahead where the least privacy is asked for, or where the most is?",
        corpus="shakespeare",
        places=(AT_1024,),
        epsilons=(0.25, 1, 32),
        uls=(1, 4, 8, 16),
        els=(1, 4, 13),
        longer=True,
    ),
)


@dataclass(frozen=True, kw_only=True)
class SweepOf:
    """One sweep of a study: those of its ε that share a learning rate, at one place.

    Attributes:
        study: The study, with these ε alone.
        place: The split of compute.
        rate: The server's learning rate.
    """

    study: Study
    place: Place
    rate: float

    @property
    def name(self) -> str:
        """Its folder's."""
        return f"{self.study.name}-{self.place}-lr{self.rate:g}"

    @property
    def reads(self) -> tuple[str, ...]:
        """Of the folder of corpora."""
        return MODEL, file_of(self.study.corpus)

    def arguments(self, corpora: Path, output: Path) -> list[str]:
        """Of the command line, after the program's name."""
        study = self.study
        algorithms = [name for name, groups in (("uls", study.uls), ("els", study.els)) if groups]
        sweep = {
            "algorithms": algorithms,
            "epsilons": study.epsilons,
            "compute": [self.place.gradients],
            "uls-group-sizes": study.uls,
            "els-group-sizes": study.els,
            "learning-rates": [self.rate],
            "bands": study.bands,
            "seeds": [study.seeds],
            "repeat": ["best"],
        }
        return [
            *("sweep", *self._data(corpora, output)),
            *("--model.path", str(corpora / MODEL), "--plan.rounds", str(self.place.rounds)),
            *("--evaluation.every", str(self.place.rounds), "--sweep.no-nonprivate"),
            *(word for name, values in sweep.items() if values for word in (f"--sweep.{name}", *map(_word, values))),
            *("--output", str(output / self.name)),
        ]

    def _data(self, corpora: Path, output: Path) -> list[str]:
        corpus, regroup = self.study.corpus, ()
        if corpus in SYNTHETIC:
            return [*SYNTHETIC_OPTIONS, "--data.path", str(output / SYNTHETIC[corpus].file)]
        if corpus in REGROUPED:
            corpus, kind = REGROUPED[corpus]
            regroup = ("--data.regroup", kind)
        return ["--preset", corpus, "--data.path", str(corpora / FILES[corpus]), *regroup]


def file_of(corpus: str) -> str:
    """What of the folder of corpora a corpus is made of."""
    return BOOKS if corpus in SYNTHETIC else FILES[REGROUPED.get(corpus, (corpus, ""))[0]]


def sweeps_of(study: Study, rates: Rates) -> Iterator[SweepOf]:
    """The sweeps of a study, at the learning rates that public users chose."""
    for place in study.places:
        by_rate: dict[float, list[float]] = {}
        for epsilon in study.epsilons:
            by_rate.setdefault(rates.at(place.gradients, place.rounds, epsilon), []).append(epsilon)
        for rate, epsilons in by_rate.items():
            yield SweepOf(study=replace(study, epsilons=tuple(epsilons)), place=place, rate=rate)


def _word(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
