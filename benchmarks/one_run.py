"""How near to ε audits of one run come, and whether they keep their confidence: `python -m benchmarks.one_run`.

Each plan promises the same ε and is run again and again, with other coins, sampling and noise. Every trial is a whole
run of the real round, with canaries that have parameters of their own. Ends with a line of JSON, and with exit code 1
where bounds of a kind lay above ε more often than their confidence permits.
"""

import dataclasses
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

from benchmarks.command_line import run_benchmark
from experiments.audit.attacks import one_run
from fedsim.config import PlanConfig
from fedsim.errors import InvalidInput
from fedsim.plan import Plan, UserSizes
from fedsim.validation import require_at_least

PLANS: dict[str, dict[str, Any]] = {
    "everybody": {"share": 1.0},
    "a tenth": {"share": 0.1},
    "3 in 100": {"share": 0.03},
    "els": {"share": 0.1, "algorithm": "els", "group_size": 2},
    "bands": {"share": 0.1, "bands": "4"},
    "quantile": {"share": 1.0, "clip_quantile": 0.5},
}
"""What is audited, by name: the share of all units that a round expects, and options of the plan."""
UNLIKELY = 1e-3
"""How seldom so many bounds may lie above ε by chance."""


@dataclass(frozen=True, kw_only=True)
class OneRun:
    """Audit whole runs of several plans, again and again."""

    plans: tuple[str, ...] = tuple(PLANS)
    """Which plans."""
    trials: int = 50
    """Runs of each plan."""
    canaries: int = 10_000
    """Canaries of a run; where users have several examples, so many users."""
    parameters: int = 100_000
    """Size of the model, which the canaries divide among them."""
    rounds: int = 24
    """Rounds of a run."""
    epsilon: float = 4.0
    """Certified ε of each plan."""
    delta: float = 1e-5
    """Its δ."""
    confidence: float = 0.95
    """Of each lower bound."""
    seed: int = 1
    """Of the first trial; others follow."""
    processes: int = 2
    """Trials that run at the same time."""

    def run(self) -> int:
        """Print a table, and one line of JSON."""
        require_at_least("trials", self.trials, 1)
        require_at_least("processes", self.processes, 1)
        if unknown := [name for name in self.plans if name not in PLANS]:
            raise InvalidInput("plans", unknown[0], f"among {', '.join(PLANS)}")
        print("| plan | trials | together: median (least to most) | each by itself | any mechanism | above ε |")
        print("|---|---|---|---|---|---|", flush=True)
        found = {}
        with ProcessPoolExecutor(self.processes, multiprocessing.get_context("spawn")) as pool:
            for name in self.plans:
                seeds = range(self.seed, self.seed + self.trials)
                bounds = np.array(list(pool.map(Trial(self.plan(name), self), seeds)))
                above = (bounds > self.epsilon).sum(axis=0)
                cells = [name, str(self.trials), *map(_in_words, bounds.T), ", ".join(map(str, above))]
                print(f"| {' | '.join(cells)} |", flush=True)
                found[name] = {"bounds": bounds.round(3).tolist(), "above": above.tolist()}
        print(json.dumps({"benchmark": "one_run", **dataclasses.asdict(self), "found": found}))
        most = scipy.stats.binom.isf(UNLIKELY, self.trials, 1 - self.confidence)
        return int(any(max(one["above"]) > most for one in found.values()))

    def plan(self, name: str) -> Plan:
        """A plan that promises the ε."""
        options = dict(PLANS[name])
        group = options.setdefault("group_size", 1)
        units = options.pop("share") * self.canaries * (group if options.get("algorithm") == "els" else 1)
        config = PlanConfig(
            gradients_per_round=round(units * (1 if options.get("algorithm") == "els" else group)),
            rounds=self.rounds,
            epsilon=self.epsilon,
            delta=self.delta,
            **options,
        )
        return config.for_users(UserSizes.of_quantiles(self.canaries, {0.5: config.examples_per_user}))


@dataclass(frozen=True)
class Trial:
    """One audit of a plan.

    Attributes:
        plan: The plan.
        asked: How it is audited.
    """

    plan: Plan
    asked: OneRun

    def __call__(self, seed: int) -> tuple[float, float, float]:
        """Lower bounds on ε: of all canaries together, of each by itself, and of any mechanism."""
        common = {"canaries": self.asked.canaries, "confidence": self.asked.confidence, "seed": seed}
        together, *alone = one_run(self.plan, **common, parameters=self.asked.parameters)
        by_itself = alone[0].epsilon_lower if alone else 0.0
        return together.epsilon_lower, by_itself, together.epsilon_lower_free


def _in_words(bounds: np.ndarray) -> str:
    return f"{np.median(bounds):.2f} ({bounds.min():.2f} to {bounds.max():.2f})"


if __name__ == "__main__":
    sys.exit(run_benchmark(OneRun))
