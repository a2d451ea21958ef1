"""The round loop: sample, charge, ask, sum, add noise, divide, step."""

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from fedsim.config import RunConfig
from fedsim.engine.exact import dequantise, resolution_for
from fedsim.engine.messages import TrainRequest, parameters_record
from fedsim.plan import ElsPlan, Plan
from fedsim.privacy.ledger import Ledger
from fedsim.resources import Resources
from server.budget import Budget
from server.dispatch import Dispatcher
from server.evaluation import Evaluation, evaluate, held_out_rows
from server.optimizer import ServerOptimizer
from server.progress import RoundProgress
from server.release import Release
from server.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished run achieved.

    Attributes:
        parameters: The fine-tuned trainable parameters, float32 [P].
        before: Test users under the model as it was loaded.
        after: Test users under the fine-tuned model.
        rounds: Rounds released.
        epsilon: Upper bound on the user-level ε spent.
        seconds: Of training, without evaluation of test users.
    """

    parameters: np.ndarray
    before: Evaluation
    after: Evaluation
    rounds: int
    epsilon: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """The run's secrets: what they decide must not be guessed by whoever sees the model."""

    sampling: int
    noise: int


class Training:
    """One run on a grid.

    Args:
        config: The run's configuration.
        plan: The calibrated plan.
        resources: Model and store; the server uses the store's sizes, never a user's text.
        grid: Where the clients are.
        folder: Where results go.
        seeds: Sampling and noise seeds.
        parameters: Trainable parameters at the start, float32 [P]; updated in place.
        sizes: Values of each parameter by name, in the order of the vector; by default it is one parameter.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        resources: Resources,
        grid: Grid,
        folder: RunFolder,
        seeds: Seeds,
        parameters: np.ndarray,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.config = config
        self.plan = plan
        self.grid = grid
        self.folder = folder
        self.seeds = seeds
        self.parameters = parameters
        self.train = resources.store.split("train")
        self.validation = resources.store.split("validation")
        self.test = resources.store.split("test")
        self.ledger = Ledger.open(folder.ledger)
        self.budget = Budget(plan, self.ledger, config.plan.epsilon)
        self.optimizer = ServerOptimizer(parameters, config.optimizer, plan.steps)
        self.dispatcher = Dispatcher(
            grid, units_per_message=config.engine.users_per_message or None, timeout=config.engine.timeout_seconds
        )
        self._kept = plan.kept_rows(self.train, seeds.sampling) if isinstance(plan, ElsPlan) else None
        self.release = Release(plan, sizes or {"parameters": len(parameters)}, seeds.noise)
        self._validation_rows = held_out_rows(self.validation, config.evaluation.max_rows)
        self._seconds = 0.0

    def run(self) -> Outcome:
        """Train until the plan's steps are done or the budget is spent."""
        test_rows = held_out_rows(self.test, self.config.evaluation.test_rows)
        before = evaluate(self.grid, self.test, "test", test_rows, parameters_record(self.parameters))
        round = measured = 0
        with RoundProgress(self.plan.name.upper(), self.plan.steps) as progress:
            self._measure(round, progress, {})
            while round < self.plan.steps and self.budget.affords_another():
                statistics = self._round(round)
                round += 1
                progress.advanced(round, self.budget.epsilon())
                if round % self.config.evaluation.every == 0:
                    self._measure(measured := round, progress, statistics)
            if measured < round:
                self._measure(round, progress, statistics)
            if round < self.plan.steps:
                progress.stopped(round, self.config.plan.epsilon)
        after = evaluate(self.grid, self.test, "test", test_rows, parameters_record(self.parameters))
        return Outcome(
            parameters=self.parameters,
            before=before,
            after=after,
            rounds=round,
            epsilon=self.budget.epsilon(),
            seconds=self._seconds,
        )

    def _round(self, round: int) -> dict[str, float]:
        """One release and one optimizer step; returns sums over the cohort, which are private."""
        started = time.perf_counter()
        units, following = self._units(round), self._units(round + 1)
        exact = self.config.engine.exact
        resolution = resolution_for(self.release.norm_bound, self.plan.population) if exact else 0.0
        self.budget.charge(round)
        request = TrainRequest(
            plan=self.plan.to_json(),
            round=round,
            sampling_seed=self.seeds.sampling,
            units=units,
            clip_norm=self.release.clip_norm,
            parameters=parameters_record(self.parameters),
            settings=self.release.scales(),
            resolution=resolution,
        )
        gathered = self.dispatcher.gather(
            request, self._costs(units), next_units=following, next_costs=self._costs(following)
        )
        total = dequantise(gathered.total, resolution) if resolution else gathered.total
        mean = self.release.noised_mean(total, round).astype(np.float32, copy=False)
        statistics = {**gathered.statistics, "units": float(len(units))}
        self.release.observe(mean, self.parameters, statistics, round)
        self.optimizer.step(mean)
        self._seconds += time.perf_counter() - started
        return statistics

    def _units(self, round: int) -> np.ndarray:
        """The units that a round samples: users (ULS), or rows of kept examples (ELS)."""
        units = self.plan.sample(round, self.seeds.sampling)
        return units if self._kept is None else self._kept[units]

    def _costs(self, units: np.ndarray) -> np.ndarray:
        """Predicted tokens of each unit, float64."""
        if self._kept is not None:
            return self.train.row_lengths[units].astype(np.float64)
        sizes = np.diff(self.train.user_offsets)[units]
        return np.minimum(sizes, self.plan.group_size) * float(self.config.data.sequence_length)

    def _measure(self, round: int, progress: RoundProgress, statistics: dict[str, float]) -> None:
        """Evaluate on validation users and write a line of metrics."""
        measured = evaluate(
            self.grid, self.validation, "validation", self._validation_rows, parameters_record(self.parameters)
        )
        epsilon = self.budget.epsilon()
        spent = epsilon if math.isfinite(epsilon) else None
        progress.evaluated(round, measured.loss, measured.accuracy, epsilon)
        units = statistics.get("units", 0.0)
        self.folder.append_metrics(
            {
                "round": round,
                "loss": measured.loss,
                "perplexity": measured.perplexity,
                "accuracy": measured.accuracy,
                "epsilon": spent,
                "gradient_evaluations": round * self.plan.gradients_per_round,
                "learning_rate": self.optimizer.learning_rate,
                "clip_norm": self.release.clip_norm,
                "seconds": self._seconds,
                # Computed from training users without noise: for debugging, never for release.
                "not_private": {
                    "units": units,
                    "train_loss": statistics["loss_sum"] / units,
                    "clipped_fraction": statistics["clipped_units"] / units,
                    "nonfinite_units": statistics["nonfinite_units"],
                }
                if units
                else {},
            }
        )


def describe(plan: Plan) -> dict[str, Any]:
    """The plan's public fields and constants, for reports."""
    values = {item.name: getattr(plan, item.name) for item in dataclasses.fields(plan)}
    values["adjacency"] = plan.adjacency.value
    return {"algorithm": plan.name, **values, "normaliser": plan.normaliser, "noise_std": plan.noise_std}
