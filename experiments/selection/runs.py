"""The runs of a private selection: settings drawn from a grid, and each run with randomness of its own."""

import dataclasses
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.sweep.points import Point, SweepConfig, points_of
from fedsim.config import EvaluationConfig, RunConfig
from fedsim.errors import InvalidInput
from fedsim.privacy.adjacency import Adjacency
from fedsim.randomness import derived_seed

ADAPTIVE = (
    "A search that looks at results to say what to try next makes runs depend on each other, and the proof needs "
    "settings that are drawn independently of all results"
)
PRIVATE = "private_not_for_release"
"""What must stay secret: how many runs there are, what they drew, and all that they leave."""
SELECTIONS = ("none", "private")


@dataclass(frozen=True, kw_only=True)
class DrawnRun(Point):
    """One run; `seed` is its number among them.

    Attributes:
        score_epsilon: ε of its score to a held-out user.
    """

    score_epsilon: float

    @property
    def name(self) -> str:
        """The name of its folder, which tells nothing of its setting."""
        return f"run-{self.seed:04d}"

    def config(self, common: RunConfig, output: Path) -> RunConfig:
        """The run of this setting, scored once, when it is done. Its seeds are drawn by the operating system; where
        the command gives seeds, no two runs have the same."""
        run = super().config(dataclasses.replace(common, release=False), output)  # whose seeds are given
        number = json.dumps([self.name, self.to_json()], sort_keys=True)
        given = {
            kind: None if seed is None else derived_seed(seed, kind, number)
            for kind, seed in (("sampling", common.sampling_seed), ("noise", common.noise_seed))
        }
        score = dataclasses.replace(
            run.evaluation, private=True, private_epsilon=self.score_epsilon, every=max(run.plan.rounds, 1)
        )
        return dataclasses.replace(
            run,
            evaluation=score,
            sampling_seed=given["sampling"],
            noise_seed=given["noise"],
            release=common.release,
        )


def require_kind(select: str) -> None:
    """Refuse a way to select that is none, or that no theorem covers.

    Raises:
        InvalidInput: Says why.
    """
    if select not in SELECTIONS:
        raise InvalidInput("select", select, "none or private", f"{ADAPTIVE}.")


def require_selectable(common: RunConfig, sweep: SweepConfig) -> None:
    """Refuse what a private selection is not, before anything runs.

    Raises:
        InvalidInput: Names the option.
    """
    beside = "with --select private"
    if sweep.repeat != "all":
        raise InvalidInput("sweep.repeat", sweep.repeat, f"all {beside}", f"{ADAPTIVE}.")
    if sweep.epsilons:
        hint = "--plan.epsilon is the total of the release; what each run may spend follows from it."
        raise InvalidInput("sweep.epsilons", sweep.epsilons, f"left out {beside}", hint)
    if sweep.seeds != SweepConfig().seeds:
        hint = "How often a setting runs is drawn: --selection.expected-runs."
        raise InvalidInput("sweep.seeds", sweep.seeds, f"left out {beside}", hint)
    if common.evaluation.every != EvaluationConfig().every:
        hint = "A run is scored once, when it is done, so that all of the score's ε is in that one value."
        raise InvalidInput("evaluation.every", common.evaluation.every, f"left out {beside}", hint)
    if sweep.keep_models:
        hint = "The bound is for the release of one model: all others are deleted."
        raise InvalidInput("sweep.keep-models", True, f"off {beside}", hint)
    if common.plan.noise_multiplier is not None:
        hint = "Each run has the noise that --plan.epsilon, the total, asks for."
        raise InvalidInput("plan.noise-multiplier", common.plan.noise_multiplier, f"left out {beside}", hint)
    if common.plan.adjacency != Adjacency.ADD_OR_REMOVE_ONE_USER.value:
        hint = "Scores come from held-out users, who are told apart from training users by their own ids."
        allowed = f"{Adjacency.ADD_OR_REMOVE_ONE_USER.value} {beside}"
        raise InvalidInput("plan.adjacency", common.plan.adjacency, allowed, hint)
    if common.trackers or common.callbacks:
        option = "trackers" if common.trackers else "callbacks"
        hint = "They would tell of runs that must stay secret."
        raise InvalidInput(option, getattr(common, option), f"left out {beside}", hint)


def settings_of(sweep: SweepConfig, common: RunConfig) -> list[Point]:
    """The grid: every combination once."""
    return points_of(dataclasses.replace(sweep, seeds=1, nonprivate=False), common)


def at(setting: Point, number: int, epsilon: float, score_epsilon: float) -> DrawnRun:
    """A run of a setting, at what one run may spend."""
    values: dict[str, Any] = {item.name: getattr(setting, item.name) for item in dataclasses.fields(Point)}
    return DrawnRun(**(values | {"seed": number, "epsilon": epsilon, "score_epsilon": score_epsilon}))


def drawn(settings: int, runs: int) -> list[int]:
    """Which setting each run has, drawn with replacement by the operating system."""
    return [secrets.randbelow(settings) for _ in range(runs)]
