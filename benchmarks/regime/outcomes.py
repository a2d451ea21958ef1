"""What came out of the studies: each setting, the lead of ULS, and whether it grows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.regime.kept import Kept, Named, Shelf
from benchmarks.regime.rates import PILOTS, Rates
from benchmarks.regime.studies import AT_1024, Place, Study, sweeps_of
from experiments.sweep.results import cells_of, contrast, half_width, lead


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All seeds of one setting.

    Attributes:
        study: The study's name.
        corpus: Whose text.
        place: B and T.
        epsilon: User-level ε.
        arm: "uls" or "els".
        group_size, bands, rate: The setting.
        noise_multiplier: σ.
        units: What a sum is divided by.
        noise: Standard deviation on a coordinate of a released mean, in clip norms; where noise is correlated over
            rounds, of the independent noise that would leave as much.
        losses: Of test users, one a seed.
        validation: Mean loss of validation users, by which settings are chosen.
    """

    study: str
    corpus: str
    place: Place
    epsilon: float
    arm: str
    group_size: int
    bands: str
    rate: float
    noise_multiplier: float
    units: float
    noise: float
    losses: tuple[float, ...]
    validation: float

    @property
    def loss(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.losses))

    @property
    def half(self) -> float | None:
        """Half of the 95 % interval; None for one seed."""
        return half_width(np.array(self.losses))


@dataclass(frozen=True, kw_only=True)
class Lead:
    """The loss of the best setting of ELS minus that of ULS, settings chosen on validation users.

    Attributes:
        uls, els: The best of each.
        nats: The lead of ULS; negative where ELS is ahead.
        half: Half of its 95 % interval (Welch); None for single seeds.
    """

    uls: Setting
    els: Setting
    nats: float
    half: float | None

    @property
    def decided(self) -> str:
        """Who is ahead beyond the interval, or that nobody is."""
        if self.half is None or abs(self.nats) <= self.half:
            return "level"
        return "ULS" if self.nats > 0 else "ELS"


@dataclass(frozen=True)
class Took:
    """How long points took.

    Attributes:
        points: How many.
        seconds: Of all of them, one after another; a sweep runs one on each core.
    """

    points: int
    seconds: float

    @classmethod
    def of(cls, points: Sequence[dict[str, Any]]) -> "Took":
        """Of points as sweeps list them."""
        return cls(len(points), sum(point["seconds"] for point in points))

    def __str__(self) -> str:
        return f"{self.points} points ran for {self.seconds / 3600:.1f} hours"


@dataclass(frozen=True, kw_only=True)
class Results:
    """What is finished.

    Attributes:
        settings: All settings of all studies.
        pretrained: Loss before fine-tuning, by corpus.
        took: Points of the studies that run unless others are asked for, and of their pilots.
        longer: Points of the longer studies, and of theirs.
        dates: When sweeps were finished.
        versions: Of the packages that they ran on, each once.
    """

    settings: tuple[Setting, ...]
    pretrained: dict[str, float]
    took: Took
    longer: Took
    dates: tuple[str, ...]
    versions: tuple[str, ...]

    def among(self, wanted: Callable[[Setting], bool]) -> "Results":
        """The same with these settings alone."""
        return replace(self, settings=tuple(filter(wanted, self.settings)))

    def of(self, **values: Any) -> Iterator[Setting]:
        """Settings whose attributes are these."""
        for setting in self.settings:
            if all(getattr(setting, name) == value for name, value in values.items()):
                yield setting


def gathered(shelf: Shelf, studies: Iterable[Study], rates: Rates) -> Results:
    """The results of every sweep that is there.

    Args:
        shelf: Finished sweeps.
        studies: All studies; sweeps of theirs that are not finished are left out.
        rates: The learning rates, which name the sweeps.
    """
    settings: list[Setting] = []
    pretrained: dict[str, float] = {}
    found: list[Kept] = []
    points: dict[bool, list[dict[str, Any]]] = {False: [], True: []}

    def find(sweep: Named, longer: bool) -> Kept | None:
        kept = shelf.find(sweep)
        if kept is not None:
            found.append(kept)
            points[longer] += kept.points
        return kept

    for pilot in PILOTS:
        find(pilot, pilot.longer)
    for study in studies:
        for sweep in sweeps_of(study, rates):
            kept = find(sweep, study.longer)
            if kept is not None:
                pretrained[study.corpus] = kept.pretrained_loss
                settings += _settings(study, sweep.place, kept.points)
    return Results(
        settings=tuple(settings),
        pretrained=pretrained,
        took=Took.of(points[False]),
        longer=Took.of(points[True]),
        dates=tuple(sorted({kept.date for kept in found})),
        versions=tuple(
            sorted({f"{name} {kept.versions[name]}" for kept in found for name in ("torch", "transformers")})
        ),
    )


def _settings(study: Study, place: Place, points: Sequence[dict[str, Any]]) -> Iterator[Setting]:
    for cell in cells_of(points):
        for tried in cell["settings"]:
            own = [point for point in points if _is_of(point, cell, tried)]
            yield Setting(
                study=study.name,
                corpus=study.corpus,
                place=place,
                epsilon=cell["epsilon"],
                arm=cell["arm"],
                group_size=tried["group_size"],
                bands=tried["bands"],
                rate=tried["learning_rate"],
                noise_multiplier=own[0]["noise_multiplier"],
                units=own[0]["noise_multiplier"] * own[0]["clip_norm"] / own[0]["noise"],
                noise=_independent(cell, tried)["noise"] * tried["predicted_noise_ratio"],
                losses=tuple(point["test_loss"] for point in own),
                validation=tried["validation_loss"],
            )


def _independent(cell: dict[str, Any], tried: dict[str, Any]) -> dict[str, Any]:
    """The same setting with independent noise; itself where it alone was tried."""
    same = [one for one in cell["settings"] if one["bands"] == "1" and one["group_size"] == tried["group_size"]]
    return same[0] if same else tried


def _is_of(point: dict[str, Any], cell: dict[str, Any], tried: dict[str, Any]) -> bool:
    same = all(point[name] == cell[name] for name in ("arm", "epsilon", "gradients_per_round"))
    return same and all(point[name] == tried[name] for name in ("group_size", "learning_rate", "clip_norm", "bands"))


def leads(results: Results, **values: Any) -> list[Lead]:
    """The lead of ULS wherever both algorithms ran with independent noise, by place and ε.

    Args:
        results: All.
        values: Which settings, as for `Results.of`.
    """
    by_cell: dict[tuple[int, int, float], list[Setting]] = {}
    for one in results.of(bands="1", **values):
        by_cell.setdefault((one.place.gradients, one.place.rounds, one.epsilon), []).append(one)
    bests = [_best_by_arm(by_cell[cell]) for cell in sorted(by_cell)]
    return [lead_of(found["uls"], found["els"]) for found in bests if len(found) == 2]


def lead_of(uls: Setting, els: Setting) -> Lead:
    """The lead of one setting over another."""
    seeds = [{"losses": dict(enumerate(one.losses))} for one in (uls, els)]
    nats, half = lead(*seeds)
    return Lead(uls=uls, els=els, nats=nats, half=half)


def best(settings: Iterable[Setting]) -> Setting:
    """The setting of least validation loss, of those with most seeds."""
    settings = list(settings)
    most = max(len(one.losses) for one in settings)
    return min((one for one in settings if len(one.losses) == most), key=lambda one: one.validation)


def _best_by_arm(settings: Iterable[Setting]) -> dict[str, Setting]:
    settings = list(settings)
    return {arm: best(one for one in settings if one.arm == arm) for arm in {one.arm for one in settings}}


def at_25_rounds(results: Results, epsilon: float = 2.0) -> list[Lead]:
    """The leads on Shakespeare at one ε and 25 rounds, by compute: of more than one study."""
    found = leads(results, corpus="shakespeare", epsilon=epsilon)
    return [one for one in found if one.uls.place.rounds == AT_1024.rounds]


def by_diversity(results: Results, text: str, epsilon: float = 2.0) -> list[Lead]:
    """The leads on text of one kind, from the least diverse users on; at one ε and AT_1024.

    Args:
        results: Of the study.
        text: "shakespeare" or "synthetic".
        epsilon: ε.
    """
    kinds = (f"{text}-alike", text, f"{text}-mixed")
    return [one for kind in kinds for one in leads(results, corpus=kind, epsilon=epsilon, place=AT_1024)]


def growth(first: Lead, second: Lead) -> tuple[float, float | None]:
    """By how much the second lead is larger, and half of the 95 % interval of that (Welch, of four means)."""
    samples = [np.array(one.losses) for pair in (first, second) for one in (pair.uls, pair.els)]
    return contrast(samples, [1, -1, -1, 1])
