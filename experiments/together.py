"""What the models of several finished runs on the same users cost together: the composition of their ledgers.

Composition needs independent randomness. Runs whose sampling or noise came from one seed are not independent: the
difference of two sums with the same noise has no noise at all. Of such runs nothing is claimed together.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedsim.errors import InvalidInput
from fedsim.plan import Plan, plan_from_values
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.bounds import Bounds, shown_above
from fedsim.privacy.events import Composed
from fedsim.privacy.ledger import merged, read_entries
from server.results.run_folder import RunFolder, without_infinities

SEEDS = {"sampling": "sampling-seed", "noise": "noise-seed"}
"""Kinds of seeds, and the settings that give them."""


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A finished run, as far as it matters who else gets its model.

    Attributes:
        name: What people call it.
        plan: What was done.
        charged: What its ledger holds.
        seeds: The seeds that its settings give, by kind; others came from the operating system.
    """

    name: str
    plan: Plan
    charged: Composed
    seeds: Mapping[str, int]

    @classmethod
    def read(cls, name: str, folder: Path) -> Self:
        """What a run left in its folder.

        Raises:
            InvalidInput: When that is not a finished run.
            LedgerDamaged: When its ledger is not what was written.
        """
        run = RunFolder(folder, new=False)
        try:
            written = json.loads(run.config.read_text(encoding="utf-8"))
            settings, described = written["config"], written["plan"]
            seeds = {kind: int(settings[key]) for kind, key in SEEDS.items() if settings.get(key) is not None}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            hint = f"Reading its config.json said: {error}."
            raise InvalidInput("folder", str(folder), "the folder of a finished run", hint) from None
        plan = plan_from_values(described)  # imports the module of a mechanism of one's own, and so its event's
        charged = merged(entry.event for entry in read_entries(run.ledger))
        return cls(name=name, plan=plan, charged=charged, seeds=seeds)

    @property
    def private(self) -> bool:
        """Whether it has a guarantee at all."""
        return self.plan.noise_multiplier > 0


@dataclass(frozen=True, kw_only=True)
class Together:
    """What releasing the models of several runs on the same users costs.

    Attributes:
        models: How many.
        epsilon: Certified bounds on their user-level ε together at delta; None where nothing is claimed.
        delta: δ.
        unclaimed: Why nothing is claimed, as the end of a sentence; empty where ε is.
        seeds_known: Kinds of seeds that settings gave: whoever knows the settings knows them.
    """

    models: int
    epsilon: Bounds | None
    delta: float
    unclaimed: str
    seeds_known: tuple[str, ...]

    @classmethod
    def of(cls, runs: Iterable[FinishedRun], *, tolerance: float = 1e-3, unclaimed: str = "") -> Self:
        """Compose the ledgers of runs, if they are independent and each has a guarantee.

        Args:
            runs: At least one.
            unclaimed: Why nothing may be claimed, where the caller knows a reason that the runs do not show.
            tolerance: Largest relative distance of the bounds on ε.
        """
        runs = tuple(runs)
        delta = max(run.plan.delta for run in runs)
        unclaimed = unclaimed or _without_guarantee(runs) or _at_odds(runs) or _sharing(runs)
        epsilon = None
        if not unclaimed:
            everything = Composed(events=tuple(run.charged for run in runs))
            epsilon = epsilon_bounds(everything, delta, adjacency=runs[0].plan.adjacency, tolerance=tolerance)
        return cls(
            models=len(runs),
            epsilon=epsilon,
            delta=delta,
            unclaimed=unclaimed,
            seeds_known=tuple(kind for kind in SEEDS if any(kind in run.seeds for run in runs)),
        )

    @property
    def guarantee(self) -> str:
        """The guarantee, "(ε, δ)" with ε rounded up; "no finite ε" where the composition has none."""
        if self.epsilon is None:
            raise ValueError(f"nothing is claimed of these models together: {self.unclaimed}")
        if math.isinf(self.epsilon.upper):
            return "no finite ε"
        return f"({shown_above(self.epsilon.upper)}, {self.delta:g})"

    def warning(self) -> str:
        """What follows from seeds that others may know; empty where there are none."""
        if "noise" in self.seeds_known:
            return (
                "The noise seeds of these runs follow from their settings: whoever knows them can subtract the noise, "
                "so none of their models may be released."
            )
        if "sampling" in self.seeds_known:
            return (
                "The sampling seeds of these runs follow from their settings: from whoever knows them the sampling "
                "hides nobody, and ε is larger."
            )
        return ""

    def in_words(self) -> str:
        """What it costs to release the arms of a comparison."""
        alone = "Each statement speaks of the model of its own arm alone."
        if self.epsilon is None:
            told = f"No ε is stated for releasing all {self.models} models: {self.unclaimed}."
        else:
            told = (
                f"Releasing all {self.models} models costs what they cost together: {self.guarantee}, user-level, by "
                "composition of their ledgers. So does releasing the one that did best: choosing it looks at all."
            )
        return " ".join(filter(None, (alone, told, self.warning())))

    def to_json(self) -> dict[str, Any]:
        """As JSON values; ε is null where nothing is claimed, or none is finite."""
        bounds = {"upper": None, "lower": None}
        if self.epsilon is not None:
            bounds = without_infinities({"upper": self.epsilon.upper, "lower": self.epsilon.lower})
        return {
            "models": self.models,
            "epsilon": bounds,
            "delta": self.delta,
            "unclaimed": self.unclaimed or None,
            "seeds_known": list(self.seeds_known),
            "in_words": self.in_words(),
        }


def _without_guarantee(runs: tuple[FinishedRun, ...]) -> str:
    names = [run.name for run in runs if not run.private]
    return f"{_listed(names)} {_was(names)} trained without privacy" if names else ""


def _at_odds(runs: tuple[FinishedRun, ...]) -> str:
    """Runs whose guarantees are about different changes of the data."""
    return "" if len({run.plan.adjacency for run in runs}) == 1 else "their guarantees hide different changes"


def _sharing(runs: tuple[FinishedRun, ...]) -> str:
    """Runs that are not independent of each other."""
    for kind in reversed(SEEDS):
        counts = Counter(run.seeds[kind] for run in runs if kind in run.seeds)
        names = [run.name for run in runs if kind in run.seeds and counts[run.seeds[kind]] > 1]
        if names:
            return (
                f"{_listed(names)} each share the {kind} seed of another of these runs, so that they are not "
                "independent, and no composition of their ε is known to hold"
            )
    return ""


def _listed(names: list[str]) -> str:
    """Two names, and how many more."""
    if len(names) > 3:
        return f"{', '.join(names[:2])} and {len(names) - 2} others"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _was(names: list[str]) -> str:
    return "was" if len(names) == 1 else "were"
