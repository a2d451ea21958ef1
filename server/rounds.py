"""The round loop: sample, charge, ask, sum, add noise, divide, step."""

import dataclasses
import math
import time
from collections import Counter
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
from fedsim.terminal import RoundProgress, waiting
from server.alarms import Alarms
from server.budget import Budget
from server.checkpoint import CheckpointWriter
from server.dispatch import Dispatcher
from server.evaluation import Measurement, evaluate, held_out_rows
from server.optimizer import ServerOptimizer
from server.release import Release
from server.resume import snapshot
from server.run_folder import RunFolder
from server.seeds import Seeds
from server.stopping import Stopped, StopRequest


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
    before: Measurement
    after: Measurement
    rounds: int
    epsilon: float
    seconds: float


class Diverged(RuntimeError):
    """The weights are no longer finite. No checkpoint holds them.

    Attributes:
        round: The round whose step did it.
    """

    def __init__(self, round: int) -> None:
        self.round = round
        super().__init__(f"round {round}: the weights are no longer finite. Lower --optimizer.learning-rate.")

    def __reduce__(self) -> tuple:
        return type(self), (self.round,)


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
        identity: What checkpoints are compared by, besides the plan (`server.identity`).
        checkpoints: Where state is kept; None keeps none.
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
        identity: dict[str, Any] | None = None,
        checkpoints: CheckpointWriter | None = None,
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
        self.identity = identity or {}
        self.checkpoints = checkpoints
        self.alarms = Alarms(plan, len(parameters), private_too=config.writes_training_metrics)
        self.round = 0
        self.measured: int | None = None
        self.before: Measurement | None = None
        self.seconds = 0.0
        self._charged = Counter(entry.round for entry in self.ledger.entries)

    def run(self) -> Outcome:
        """Train until the plan's steps are done or the budget is spent.

        Raises:
            Stopped: When a signal asked to; the state is in a checkpoint then.
        """
        self.alarms.before_training(self.train.user_offsets)
        test_rows = held_out_rows(self.test, self.config.evaluation.test_rows)
        if self.before is None:
            with waiting("Evaluating the model before fine-tuning"):
                self.before = evaluate(self.grid, self.test, "test", test_rows, parameters_record(self.parameters))
        with RoundProgress(self.plan.name.upper(), self.plan.steps) as progress, StopRequest() as stop:
            progress.advanced(self.round, self.budget.epsilon())
            if self.measured is None:
                self._measure(progress, {})
            statistics: dict[str, float] = {}
            while self.round < self.plan.steps and self.budget.affords_another():
                statistics = self._round(self.round)
                self.round += 1
                self.alarms.after_round(statistics)
                progress.advanced(self.round, self.budget.epsilon())
                if self.round % self.config.evaluation.every == 0:
                    self._measure(progress, statistics)
                self._keep(stop)
            if self.measured != self.round:
                self._measure(progress, statistics)
            if self.round < self.plan.steps:
                progress.stopped(self.round, self.config.plan.epsilon)
            self._keep(stop, finished=True)
        with waiting("Evaluating the fine-tuned model"):
            after = evaluate(self.grid, self.test, "test", test_rows, parameters_record(self.parameters))
        return Outcome(
            parameters=self.parameters,
            before=self.before,
            after=after,
            rounds=self.round,
            epsilon=self.budget.epsilon(),
            seconds=self.seconds,
        )

    def _keep(self, stop: StopRequest, finished: bool = False) -> None:
        """Write a checkpoint when one is due, when training is done, or when a signal asked to stop.

        Raises:
            Stopped: In the last case.
        """
        asked = stop.signal is not None
        if self.checkpoints is not None and (asked or finished or self.checkpoints.due(self.round)):
            self.checkpoints.write(snapshot(self), wait=asked or finished)
        if stop.signal is not None:
            raise Stopped(stop.signal, self.round, str(self.folder.path))

    def _round(self, round: int) -> dict[str, float]:
        """One release and one optimizer step; returns sums over the cohort, which are private."""
        started = time.perf_counter()
        attempt = self._attempt(round)
        units, following = self._units(round), self._units(round + 1)
        exact = self.config.engine.exact
        resolution = resolution_for(self.release.norm_bound, self.plan.population) if exact else 0.0
        self.budget.charge(round)
        self._charged[round] += 1
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
        noised = self.release.noised_mean(total, round, attempt=attempt, resolution=resolution)
        mean = noised.astype(np.float32, copy=False)
        statistics = {**gathered.statistics, "units": float(len(units))}
        self.release.observe(mean, self.parameters, statistics, round, attempt=attempt)
        self.optimizer.step(mean)
        if not np.isfinite(self.parameters).all():
            raise Diverged(round)
        self.seconds += time.perf_counter() - started
        return statistics

    def _units(self, round: int) -> np.ndarray:
        """The units that a round samples: users (ULS), or rows of kept examples (ELS)."""
        units = self.plan.sample(round, self.seeds.sampling_of(self._attempt(round)))
        return units if self._kept is None else self._kept[units]

    def _attempt(self, round: int) -> int:
        """How often a round was charged and lost before; 0 too where a round that runs again repeats itself."""
        return 0 if self.seeds.repeats else self._charged[round]

    def _costs(self, units: np.ndarray) -> np.ndarray:
        """Predicted tokens of each unit, float64."""
        if self._kept is not None:
            return self.train.row_lengths[units].astype(np.float64)
        sizes = np.diff(self.train.user_offsets)[units]
        return np.minimum(sizes, self.plan.group_size) * float(self.config.data.sequence_length)

    def _measure(self, progress: RoundProgress, statistics: dict[str, float]) -> None:
        """Evaluate on validation users and write a line of metrics."""
        round = self.measured = self.round
        measured = evaluate(
            self.grid, self.validation, "validation", self._validation_rows, parameters_record(self.parameters)
        )
        if not math.isfinite(measured.loss):
            self.alarms.sound("diverged", f"the held-out loss is {measured.loss}. Lower --optimizer.learning-rate.")
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
                "seconds": self.seconds,
                # Computed from training users without noise: for debugging, never for release.
                "not_private": {
                    "units": units,
                    "train_loss": statistics["loss_sum"] / units,
                    "clipped_fraction": statistics["clipped_units"] / units,
                    "nonfinite_units": statistics["nonfinite_units"],
                }
                if units and self.config.writes_training_metrics
                else {},
            }
        )


def describe(plan: Plan) -> dict[str, Any]:
    """The plan's public fields and constants, for reports."""
    values = {item.name: getattr(plan, item.name) for item in dataclasses.fields(plan)}
    values["adjacency"] = plan.adjacency.value
    return {"algorithm": plan.name, **values, "normaliser": plan.normaliser, "noise_std": plan.noise_std}
