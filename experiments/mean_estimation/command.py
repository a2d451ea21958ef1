"""`mean-estimation`: the paper's synthetic study of ULS against ELS, simulated and in closed form."""

import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.mean_estimation.error import Population
from experiments.mean_estimation.simulation import squared_errors
from experiments.mean_estimation.tuning import Setting, tuned
from fedsim.disk import require_writable
from fedsim.errors import InvalidInput
from fedsim.plan import ALGORITHMS, Plan, UserSizes
from fedsim.planner import Target, calibrated_plans
from fedsim.validation import require_at_least, require_positive
from server.results.run_folder import new_output_folder, write_json

ARMS = {name: f"{kind.title}, best G" for name, kind in ALGORITHMS.items()} | {
    f"{name}-all": f"{kind.title}, all" for name, kind in ALGORITHMS.items() if kind.redraws
}
"""The arms: each algorithm with its best group size, and ULS with all of a user's examples."""
CONFIDENCE = 0.99
"""Of all intervals of a sweep together (Bonferroni): a correct closed form misses one in a hundred whole sweeps."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One place of the sweep."""

    epsilon: float
    gradients_per_round: int
    diversity: float


@dataclass(frozen=True, kw_only=True)
class MeanEstimation:
    """Estimate a mean with user-level privacy by ULS and by ELS, at the same compute, ε and δ.

    Examples are x = μ + a·ξ_user + b·ζ_example. Group size, clip norm and learning rate are tuned for each algorithm
    by the closed-form error, which is then compared with simulation at every point.
    """

    population: Population = field(default_factory=Population)
    """The users; its diversity is that of the sweeps over ε and compute."""
    epsilon: float = 0.5
    """User-level ε of the sweeps over compute and diversity, and of the map."""
    delta: float = 1e-5
    """User-level δ."""
    gradients_per_round: int = 256
    """Gradient evaluations a round of the sweeps over ε and diversity."""
    rounds: int = 32
    """Rounds (uls) or steps (els)."""
    epsilons: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """ε of the sweep over ε."""
    compute: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Gradient evaluations a round of the sweep over compute, and of the map."""
    diversities: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Within-user diversity b²/(a² + b²) of the sweep over diversity, and of the map."""
    group_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Group sizes that both algorithms choose from."""
    repetitions: int = 2000
    """Simulated repetitions of each arm at each point, each with its own users."""
    seed: int = 0
    """Seed of the simulation."""
    processes: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Processes that simulate."""
    output: str | None = None
    """Folder for results and figures; by default a new one under runs/."""

    def __post_init__(self) -> None:
        require_at_least("repetitions", self.repetitions, 2)
        require_at_least("processes", self.processes, 1)
        for name in ("epsilons", "compute", "diversities", "group_sizes"):
            if not getattr(self, name):
                raise InvalidInput(name.replace("_", "-"), (), "at least one value")
            for value in () if name == "diversities" else getattr(self, name):
                require_positive(name.replace("_", "-"), value)

    def run(self) -> int:
        """Run the sweep, write results.json and the figures, print the table; 1 if simulation and theory disagree."""
        from experiments.report.mean_estimation_figures import plot_map, plot_sweep

        started = time.perf_counter()
        folder = Path(self.output or new_output_folder("mean-estimation"))
        require_writable(folder)
        rows = self.simulate(self.points())
        map_rows = self.error_map()
        result = {"settings": asdict(self), "points": rows, "map": map_rows}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "results.json", json.loads(json.dumps(result)))
        for along, label in LABELS.items():
            plot_sweep(self.along(rows, along), along, label, folder / f"error_against_{along}.png")
        plot_map(map_rows, folder / "who_wins.png")
        agreeing = sum(row["agrees"] for row in rows)
        print_table(rows)
        print(
            f"{agreeing} of {len(rows)} simulated errors agree with the closed form "
            f"({CONFIDENCE:.0%} confidence for all together); {time.perf_counter() - started:.0f} s"
        )
        print(f"results: {folder}")
        return 0 if agreeing == len(rows) else 1

    def points(self) -> list[Point]:
        """The three sweeps through the base point, each place once."""
        base = Point(
            epsilon=self.epsilon,
            gradients_per_round=self.gradients_per_round,
            diversity=self.population.diversity,
        )
        points = [replace(base, epsilon=value) for value in self.epsilons]
        points += [replace(base, gradients_per_round=value) for value in self.compute]
        points += [replace(base, diversity=value) for value in self.diversities]
        return list(dict.fromkeys(points))

    def along(self, rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
        """The rows of one sweep: those that differ from the base point in this coordinate alone."""
        base = asdict(self.points()[0]) | {
            "epsilon": self.epsilon,
            "gradients_per_round": self.gradients_per_round,
            "diversity": self.population.diversity,
        }
        fixed = [key for key in base if key != name]
        matching = [row for row in rows if all(row[key] == base[key] for key in fixed)]
        return sorted(matching, key=lambda row: row[name])

    def simulate(self, points: list[Point]) -> list[dict[str, Any]]:
        """Tune and simulate every arm at every point."""
        jobs = [(point, arm, setting) for point in points for arm, setting in self._arms(point)]
        half = scipy.stats.norm.ppf(1 - (1 - CONFIDENCE) / 2 / len(jobs))
        rows = []
        # A fresh interpreter each: forking one with running threads can deadlock.
        with ProcessPoolExecutor(self.processes, mp_context=get_context("spawn")) as pool:
            futures = [
                pool.submit(
                    squared_errors,
                    replace(self.population, diversity=point.diversity),
                    setting.plan,
                    setting.learning_rate,
                    self.repetitions,
                    self.seed,
                    place,
                )
                for place, (point, _, setting) in enumerate(jobs)
            ]
            for (point, arm, setting), future in track(
                zip(jobs, futures, strict=True), "Simulating", total=len(jobs), transient=True
            ):
                rows.append(_row(point, arm, setting, future.result(), half))
        return rows

    def error_map(self) -> list[dict[str, Any]]:
        """Closed-form errors over compute × diversity: each algorithm at its best, and both with all examples."""
        rows = []
        for gradients in self.compute:
            plans = self._plans(self.epsilon, gradients)
            for diversity in self.diversities:
                population = replace(self.population, diversity=diversity)
                row: dict[str, Any] = {"gradients_per_round": gradients, "diversity": diversity}
                for name in ALGORITHMS:
                    best = tuned(population, plans[name])
                    row[name] = best.error
                    row[f"{name}_group_size"] = best.plan.group_size
                    row[f"{name}_all"] = tuned(population, plans[name][-1:]).error
                rows.append(row)
        return rows

    def _arms(self, point: Point) -> Iterator[tuple[str, Setting]]:
        population = replace(self.population, diversity=point.diversity)
        for name, plans in self._plans(point.epsilon, point.gradients_per_round).items():
            yield name, tuned(population, plans)
            if f"{name}-all" in ARMS:
                yield f"{name}-all", tuned(population, plans[-1:])

    def _plans(self, epsilon: float, gradients: int) -> dict[str, list[Plan]]:
        """Calibrated plans of each algorithm by ascending group size."""
        population = self.population
        sizes = UserSizes.of_quantiles(population.num_users, {0.5: population.examples_per_user})
        target = Target(epsilon=epsilon, delta=self.delta, gradients_per_round=gradients, rounds=self.rounds)
        groups = sorted({min(group, population.examples_per_user) for group in self.group_sizes})
        plans = calibrated_plans(sizes, target, dict.fromkeys(ALGORITHMS, groups))
        by_algorithm = {name: [plan for plan in plans if plan.name == name] for name in ALGORITHMS}
        for name, fitting in by_algorithm.items():
            if not fitting:
                raise InvalidInput("gradients-per-round", gradients, f"within what {name} can draw from the users")
        return by_algorithm


LABELS = {
    "epsilon": "user-level ε",
    "gradients_per_round": "gradient evaluations a round",
    "diversity": "within-user diversity b²/(a² + b²)",
}


def _row(point: Point, arm: str, setting: Setting, errors: np.ndarray, half: float) -> dict[str, Any]:
    mean = float(errors.mean())
    deviation = float(errors.std(ddof=1)) / math.sqrt(len(errors))
    return {
        **asdict(point),
        "arm": arm,
        "group_size": setting.plan.group_size,
        "clip_norm": setting.plan.clip_norm,
        "learning_rate": setting.learning_rate,
        "noise_multiplier": setting.plan.noise_multiplier,
        "closed_form": setting.error,
        "simulated": mean,
        "standard_error": deviation,
        "agrees": bool(abs(mean - setting.error) <= half * deviation),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Closed form beside simulation at every point."""
    table = Table(title="Mean squared error × 1000: closed form, and simulation with 95 % intervals")
    for heading in ("ε", "B", "diversity", "arm", "G", "closed form", "simulated", ""):
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row['epsilon']:g}",
            str(row["gradients_per_round"]),
            f"{row['diversity']:g}",
            ARMS[row["arm"]],
            str(row["group_size"]),
            f"{1e3 * row['closed_form']:.3f}",
            f"{1e3 * row['simulated']:.3f} ± {1e3 * 1.96 * row['standard_error']:.3f}",
            "" if row["agrees"] else "differs",
        )
    Console().print(table)
