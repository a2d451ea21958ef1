"""The points of a sweep: what varies, and the run that each point stands for."""

import dataclasses
import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fedsim.config import Average, RunConfig, to_flat
from fedsim.errors import InvalidInput
from fedsim.plan import ALGORITHMS, ALL_EXAMPLES, Algorithm
from fedsim.randomness import derived_seed
from fedsim.validation import require_at_least

UNCLIPPED = 1e6
"""Clip norm of non-private fine-tuning: above any gradient norm, so that nothing is clipped."""

CLAIM = "sweep.json"
"""What the points of a sweep's folder have in common."""
NOT_CONTENT = ("engine.", "checkpoint.", "trackers", "callbacks", "output", "resume")
"""Settings of where and how a point is computed and who is told, not of what."""

Arm = Algorithm | Literal["nonprivate"]
ARM_TITLES = {name: kind.title for name, kind in ALGORITHMS.items()} | {"nonprivate": "no privacy"}
"""The arms' names in tables and figures."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What varies. Every combination is one point; an empty list means the value of the run's own configuration."""

    algorithms: tuple[Algorithm, ...] = get_args(Algorithm)
    """The algorithms to compare."""
    epsilons: tuple[float, ...] = ()
    """User-level ε."""
    compute: tuple[int, ...] = ()
    """Gradient evaluations a round."""
    uls_group_sizes: tuple[int, ...] = ()
    """Examples of a user each round, for uls."""
    els_group_sizes: tuple[int, ...] = ()
    """Examples of a user in the whole run, for els."""
    learning_rates: tuple[float, ...] = ()
    """The server's learning rate."""
    clip_norms: tuple[float, ...] = ()
    """L2 bound on one unit."""
    bands: tuple[str, ...] = ()
    """Rounds over which noise is correlated: numbers, or auto for as many as promise the least noise."""
    averages: tuple[Average, ...] = ()
    """Averages of the released weights that are measured."""
    seeds: int = 3
    """Repetitions of every combination. No two points share a seed: those of a point's sampling and noise are derived
    from --sampling-seed and --noise-seed (0 where they are not given), its number and all of its settings."""
    repeat: Literal["all", "best"] = "all"
    """Which combinations are run with more than the first seed: all; or, of each algorithm, ε, compute, bands and
    average, the one whose first seed had the least loss on validation users. That seed counts among the others, so
    that its luck, for which it was chosen, is in their mean."""
    nonprivate: bool = True
    """Also fine-tune without noise or clipping, as the end that privacy is measured against."""
    slots: int = 0
    """Points that run at the same time; 0 runs as many as there are cores (or GPU shares)."""
    keep_models: bool = False
    """Keep every point's fine-tuned model. Their seeds are known: never release one."""

    def __post_init__(self) -> None:
        require_at_least("sweep.seeds", self.seeds, 1)
        require_at_least("sweep.slots", self.slots, 0)
        if not self.algorithms:
            raise InvalidInput("sweep.algorithms", (), "uls, els or both")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep; `seed` is its number among the repetitions of one setting."""

    arm: Arm
    epsilon: float
    gradients_per_round: int
    group_size: int
    learning_rate: float
    clip_norm: float
    seed: int
    bands: str = "1"
    average: Average = "none"

    @property
    def name(self) -> str:
        """The name of its folder; equal for equal points."""
        parts = [self.arm, f"B{self.gradients_per_round}"]
        if self.arm != "nonprivate":
            parts += [f"eps{self.epsilon:g}", f"G{self.group_size}", f"C{self.clip_norm:g}"]
            parts += [f"bands-{self.bands}"] if self.bands != "1" else []
        averaged = [] if self.average == "none" else [self.average]
        return "-".join([*parts, f"lr{self.learning_rate:g}", *averaged, f"seed{self.seed}"])

    def to_json(self) -> dict[str, Any]:
        """JSON values; an infinite ε is null, and so is a group size that bounds nothing."""
        return asdict(self) | {
            "epsilon": None if math.isinf(self.epsilon) else self.epsilon,
            "group_size": None if self.group_size >= ALL_EXAMPLES else self.group_size,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Point":
        """The point that to_json described."""
        unbounded = {"epsilon": math.inf, "group_size": ALL_EXAMPLES}
        return cls(**(values | {name: most for name, most in unbounded.items() if values[name] is None}))

    def config(self, common: RunConfig, output: Path) -> RunConfig:
        """The run of this point, with seeds of its own: the same ones whatever else the sweep has in it.

        Raises:
            InvalidInput: When a value is not allowed.
        """
        plan = dataclasses.replace(
            common.plan,
            algorithm="els" if self.arm == "nonprivate" else self.arm,
            epsilon=self.epsilon,
            gradients_per_round=self.gradients_per_round,
            group_size=self.group_size,
            clip_norm=self.clip_norm,
            bands="1" if self.arm == "nonprivate" else self.bands,
            noise_multiplier=0.0 if self.arm == "nonprivate" else None,
            allow_no_privacy=self.arm == "nonprivate",
        )
        run = dataclasses.replace(
            common,
            plan=plan,
            optimizer=dataclasses.replace(common.optimizer.averaging(self.average), learning_rate=self.learning_rate),
            engine=dataclasses.replace(common.engine, kind="local", workers=1),
            output=str(output),
        )
        setting = json.dumps([self.seed, chosen_of(run)], sort_keys=True)
        return dataclasses.replace(
            run,
            sampling_seed=derived_seed(common.sampling_seed or 0, "sampling", setting),
            noise_seed=None if common.noise.secure else derived_seed(common.noise_seed or 0, "noise", setting),
        )


def content_of(run: RunConfig) -> dict[str, Any]:
    """The settings that decide what a run computes, flat, as JSON values; an infinite ε is as JSON writes it."""
    return {name: value for name, value in to_flat(run).items() if not name.startswith(NOT_CONTENT)}


def chosen_of(run: RunConfig) -> dict[str, Any]:
    """Those of content_of that are not as by default: an option that a later version adds changes nothing of it."""
    default = content_of(type(run)())
    return {name: value for name, value in content_of(run).items() if value != default.get(name)}


def points_of(sweep: SweepConfig, run: RunConfig) -> list[Point]:
    """Every point, one seed after the other, so that all combinations have some result early."""
    compute = sweep.compute or (run.plan.gradients_per_round,)
    rates = sweep.learning_rates or (run.optimizer.learning_rate,)
    clips = sweep.clip_norms or (run.plan.clip_norm,)
    averages = sweep.averages or (run.optimizer.average,)
    points: list[Point] = []
    for seed in range(sweep.seeds):
        if sweep.nonprivate:
            points += [
                Point(
                    arm="nonprivate",
                    epsilon=math.inf,
                    gradients_per_round=gradients,
                    group_size=ALL_EXAMPLES,
                    learning_rate=rate,
                    clip_norm=UNCLIPPED,
                    seed=seed,
                    average=average,
                )
                for gradients, rate, average in itertools.product(compute, rates, averages)
            ]
        for arm in sweep.algorithms:
            own = dataclasses.replace(run.plan, algorithm=arm).examples_per_user
            groups: tuple[int, ...] = getattr(sweep, f"{arm}_group_sizes") or (own,)
            bands = sweep.bands or (str(run.plan.wanted_bands),)
            epsilons = sweep.epsilons or (run.plan.epsilon,)
            grid = itertools.product(epsilons, compute, groups, rates, clips, bands, averages)
            points += [
                Point(
                    arm=arm,
                    epsilon=epsilon,
                    gradients_per_round=gradients,
                    group_size=group,
                    learning_rate=rate,
                    clip_norm=clip,
                    bands=band,
                    seed=seed,
                    average=average,
                )
                for epsilon, gradients, group, rate, clip, band, average in grid
            ]
    return list(dict.fromkeys(points))


def require_allowed(point: Point, common: RunConfig, sweep: SweepConfig) -> None:
    """Refuse a point with a value that is not allowed.

    Raises:
        InvalidInput: Names the option that the value was given by, of the sweep or of the runs.
    """
    try:
        point.config(common, Path())
    except InvalidInput as error:
        names = {
            "plan.epsilon": "epsilons",
            "plan.gradients-per-round": "compute",
            "plan.group-size": f"{point.arm}_group_sizes",
            "plan.clip-norm": "clip_norms",
            "plan.bands": "bands",
            "optimizer.learning-rate": "learning_rates",
            "optimizer.average": "averages",
        }
        varied = names.get(error.field, "")
        if not getattr(sweep, varied, ()):
            raise
        raise InvalidInput(f"sweep.{varied.replace('_', '-')}", error.value, error.allowed, error.hint) from None
