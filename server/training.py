"""A run: rounds until the plan is done or the budget spent, measured, kept, and stopped when asked to."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.phases import CHECKPOINT, EVALUATION, OTHER, Phases, Times
from fedsim.plan import ALL_EXAMPLES, Plan
from fedsim.rows import SizeCounts
from fedsim.terminal import RoundProgress, say, waiting
from server.alarms import Alarms
from server.budget import NothingTrained as NothingTrained
from server.budget import require_charged as require_charged
from server.callbacks import Callbacks
from server.checkpoint import Checkpoint, CheckpointWriter
from server.evaluation import HeldOut, HeldOutDiverged, Measurement
from server.precautions.patience import patiently
from server.precautions.stopping import Stopped, StopRequest
from server.private_evaluation import PrivateChanges
from server.results.record import evaluated, of_training_users, privately_evaluated, record_of
from server.results.run_folder import RunFolder
from server.round import PARAMETERS, Gather, Round

BEFORE = "before/"
NOTHING_RUN: Mapping[str, float] = {}
"""Statistics where no round was run."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that is ready to begin.

    Attributes:
        round: What is done in each round.
        gather: How the workers' sums are had.
        held_out: How the model is measured.
        folder: Where results go.
        evaluate_every: Rounds between evaluations.
        training_metrics: Whether statistics of training users, which no noise protects, are written and looked at.
        checkpoints: Where state is kept; None keeps none.
        identity: What checkpoints are compared by, besides the plan (`server.identity`).
        callbacks: Who is told of each round.
        changes: Private evaluations; None where held-out losses are told without noise.
    """

    round: Round
    gather: Gather
    held_out: HeldOut
    folder: RunFolder
    evaluate_every: int
    training_metrics: bool = True
    checkpoints: CheckpointWriter | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    callbacks: Callbacks = field(default_factory=Callbacks)
    changes: PrivateChanges | None = None

    @property
    def withholds(self) -> bool:
        """Whether nothing is told of held-out users without noise."""
        return self.changes is not None and not self.training_metrics


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished run achieved.

    Attributes:
        parameters: The fine-tuned trainable parameters, float32 [P], averaged where that was asked for: the model.
        weights: Which of the weights that training made they are, in words.
        before: Test users under the model as it was loaded; None where nothing is told of them.
        after: Test users under the fine-tuned model; None likewise.
        rounds: Rounds released.
        epsilon: Upper bound on the user-level ε spent.
        seconds: Of training, without evaluation of test users.
    """

    parameters: np.ndarray
    weights: str
    before: Measurement | None
    after: Measurement | None
    rounds: int
    epsilon: float
    seconds: float


class Training:
    """A job under way.

    Args:
        job: The run.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.plan, self.budget = job.round.plan, job.round.budget
        self.alarms = Alarms(self.plan, len(job.round.parameters), private_too=job.training_metrics)
        self.round = 0
        self.measured: int | None = None
        self.before: Measurement | None = None
        self.seconds = 0.0
        self._told = Times(seconds={})  # what the lines of metrics so far told, in all

    def run(self) -> Outcome:
        """Train until the plan's steps are done or the budget is spent.

        Raises:
            Stopped: When a signal asked to; the state is in a checkpoint then.
            HeldOutDiverged: Before the next charge.
            NothingTrained: The budget has room for no round, and none was kept.
            NotKept: Before the next charge, where checkpoints can no longer be written.
        """
        if not self.round and not self.job.round.affords(0):
            raise NothingTrained(len(self.budget.ledger), self.budget.epsilon(), self.budget.limit)
        self.alarms.before_training(SizeCounts.of(self.job.round.users))
        if self.before is None and not self.job.withholds:
            with waiting("Evaluating the model before fine-tuning"):
                self.before = self.job.held_out.test(self.job.round.parameters)
        known = [record["loss"] for record in self.job.folder.read_metrics() if "loss" in record]
        titled = RoundProgress(_title(self.plan), self.plan.steps, loss=known[-1] if known else None)
        with titled as progress, StopRequest() as stop, self.phases.of(OTHER):
            progress.advanced(self.round, self.budget.epsilon())
            if self.measured is None:
                self._tell(self._measured(self._record(), progress, last=False))
            self._begin_keeping()
            goes_on = self._goes_on()
            while goes_on:
                self._require_kept(stop)
                statistics, seconds = self._next_round()
                self.alarms.after_round(statistics)
                progress.advanced(self.round, self.budget.epsilon())
                goes_on = self._goes_on()
                record = self._record(statistics, seconds)
                last_or_due = not goes_on or self.round % self.job.evaluate_every == 0
                if self.job.changes is not None and not goes_on:  # the last model, of which one value is told
                    self._keep(stop, finished=True)
                self._tell(self._measured(record, progress, last=not goes_on) if last_or_due else record)
                self._keep(stop)
            if self.measured != self.round:  # it was to go on when it was interrupted, and cannot any more
                record = self._measured(self._record(), progress, last=True)
                self._tell(record | {"not_private": self.job.folder.take_back(self.round).get("not_private", {})})
            if self.round < self.plan.steps:
                progress.stopped(self.round, self.budget.limit)
            self._keep(stop, finished=True)
        if self.job.training_metrics and self.round:
            say(f"{_title(self.plan)}: {self._times.in_words()} (Not private: it depends on users' text.)")
        optimizer = self.job.round.optimizer
        if (missing := optimizer.average.missing(self.round)) is not None:
            self.alarms.sound("no-average", missing)
        after = None
        if not self.job.withholds:
            with waiting("Evaluating the fine-tuned model"):
                after = self.job.held_out.test(optimizer.result)
        return Outcome(
            parameters=optimizer.result_on_host,
            weights=optimizer.average.weights,
            before=self.before,
            after=after,
            rounds=self.round,
            epsilon=self.budget.epsilon(),
            seconds=self.seconds,
        )

    def state(self) -> Checkpoint:
        """Everything that training needs to go on, copied, so that the next round may begin."""
        arrays = self.job.round.state()
        values: dict[str, Any] = {
            "plan": self.plan.to_values(),
            "identity": self.job.identity,
            "ledger_entries": len(self.budget.ledger),
            "metrics_bytes": self.job.folder.metrics_size,
            "metrics_waiting": list(self.job.folder.waiting),
            "measured": self.measured,
            "seconds": self.seconds,
            "phases": self._times.to_json(),
            "phases_told": self._told.to_json(),
        }
        if (before := self.before) is not None:
            arrays |= {BEFORE + "users": before.users, BEFORE + "user_losses": before.user_losses}
            values["before"] = {"loss": before.loss, "accuracy": before.accuracy, "perplexity": before.perplexity}
        if self.job.changes is not None:
            of_changes, last = self.job.changes.state()
            arrays, values = arrays | of_changes, values | last
        copies = {name: np.array(array) for name, array in arrays.items()}
        return Checkpoint(round=self.round, arrays=copies, values=values)

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Go on from where state() was taken; metrics written after that are forgotten, charges never.

        Raises:
            InvalidInput: When the checkpoint is of another plan or model, or the ledger lacks charges made before it.
        """
        values, arrays = checkpoint.values, checkpoint.arrays
        folder = self.job.folder
        if values["plan"] != self.plan.to_values() or values["identity"] != self.job.identity:
            raise InvalidInput("resume", str(folder.path), "a folder whose checkpoints are of the run itself")
        if arrays[PARAMETERS].shape != self.job.round.parameters.shape:
            raise InvalidInput("resume", str(folder.path), f"a run of {len(self.job.round.parameters)} parameters")
        if self.plan.noise_multiplier > 0:
            require_charged(self.budget.ledger, checkpoint.round, int(values["ledger_entries"]))
        self.job.round.load_state(arrays)
        self.round, self.measured = checkpoint.round, values["measured"]
        self.seconds = float(values["seconds"])
        if "phases" in values:  # earlier checkpoints know of none: what was before them is not told
            self.phases.load(Times.from_json(values["phases"]))
            self._told = Times.from_json(values["phases_told"])
        if "before" in values:
            users, losses = arrays[BEFORE + "users"], arrays[BEFORE + "user_losses"]
            self.before = Measurement(**values["before"], users=users, user_losses=losses)
        if self.job.changes is not None:
            self.job.changes.load_state(arrays, values)
        folder.cut_metrics(int(values["metrics_bytes"]))
        folder.waiting = list(values.get("metrics_waiting", ()))

    @property
    def phases(self) -> Phases:
        """Where the run's time goes."""
        return self.job.round.phases

    @property
    def _times(self) -> Times:
        """Seconds of all rounds so far."""
        return self.phases.so_far().of_rounds(self.round)

    def _next_round(self) -> tuple[dict[str, float], float]:
        """The next round's statistics, and the seconds that it took."""
        started = time.perf_counter()
        statistics = self.job.round.run(self.round, self.job.gather)
        self.round += 1
        took = time.perf_counter() - started
        self.seconds += took
        return statistics, took

    def _begin_keeping(self) -> None:
        """A checkpoint before the first charge, so that the disk is known to take one."""
        checkpoints = self.job.checkpoints
        if checkpoints is not None and checkpoints.on and self.round == 0:
            checkpoints.write(self.state(), wait=True)

    def _require_kept(self, stop: StopRequest) -> None:
        """Charge nothing more while what was charged since the last good checkpoint hangs on this process alone.

        Raises:
            NotKept: The disk refuses checkpoints for minutes.
            Stopped: A signal asked to stop meanwhile.
        """
        checkpoints = self.job.checkpoints
        if checkpoints is None or checkpoints.failure is None:
            return
        with self.phases.of(CHECKPOINT):
            state = self.state()
            try:
                patiently("a checkpoint", lambda: checkpoints.insist(state), lambda: stop.signal is not None)
            except OSError as error:
                raise checkpoints.not_kept(state) from error

    def _keep(self, stop: StopRequest, finished: bool = False) -> None:
        """Write a checkpoint when one is due, when training is done, or when a signal asked to stop.

        Raises:
            Stopped: In the last case.
        """
        checkpoints, asked = self.job.checkpoints, stop.signal is not None
        if checkpoints is not None and (asked or finished or checkpoints.due(self.round)):
            with self.phases.of(CHECKPOINT):
                checkpoints.write(self.state(), wait=asked or finished)
        if stop.signal is not None:
            lost = checkpoints is None or checkpoints.failure is not None
            raise Stopped(stop.signal, self.round, str(self.job.folder.path), lost=lost)

    def _goes_on(self) -> bool:
        """Whether there is another round to do, and budget for it."""
        return self.round < self.plan.steps and self.job.round.affords(self.round)

    def _measured(self, record: dict[str, Any], progress: RoundProgress, *, last: bool) -> dict[str, Any]:
        """The record with what validation users show: of the average alone, where there is one."""
        self.measured = self.round
        optimizer = self.job.round.optimizer
        with self.phases.of(EVALUATION):
            measured = self.job.held_out.validation(optimizer.result)
        if self.job.changes is not None:
            return self._privately(record, measured, progress, last)
        epsilon = self.budget.epsilon()
        if not math.isfinite(measured.loss):
            if len(measured.user_losses):
                raise HeldOutDiverged(self.round, measured.loss, epsilon)
            self.alarms.sound(
                "nothing-scored", "nothing in the rows of validation users is predicted: no loss is known."
            )
        progress.evaluated(self.round, measured.loss, measured.accuracy, epsilon)
        return evaluated(record, measured, optimizer.average.weights)

    def _privately(
        self, record: dict[str, Any], measured: Measurement, progress: RoundProgress, last: bool
    ) -> dict[str, Any]:
        """The record with what is released of validation users; nothing that training does follows from the rest."""
        changes, optimizer = self.job.changes, self.job.round.optimizer
        assert changes is not None
        change = changes.told(self.round, measured, optimizer.result, last=last)
        if self.round and (alarm := changes.alarm) is not None:
            self.alarms.sound(*alarm)
        record["epsilon"] = self.budget.epsilon()
        if self.round and change is not None:
            progress.changed(self.round, change, changes.evaluation.standard_deviation, record["epsilon"])
        if self.job.training_metrics:
            record = evaluated(record, measured, optimizer.average.weights)
        return privately_evaluated(record, change, optimizer.average.weights)

    def _record(self, statistics: Mapping[str, float] = NOTHING_RUN, seconds: float = 0.0) -> dict[str, Any]:
        """What is known of the last round before anything is measured."""
        return record_of(
            self.round,
            self.plan,
            self.job.round.optimizer,
            clip_norm=self.job.round.release.clip_norm,
            epsilon=self.budget.epsilon(),
            not_private=of_training_users(statistics, seconds) if self.job.training_metrics else {},
        ) | (self.job.round.norms if self.round else {})

    def _tell(self, record: dict[str, Any]) -> None:
        """Write a round's record, and tell callbacks of it."""
        if self.job.training_metrics:
            so_far, before = self._times, self._told
            self._told, times = so_far, so_far.since(before)
            if (told := record["not_private"].get("phases")) is not None:
                times = Times.from_json(told).added(times)
            record["not_private"] |= {"seconds": self.seconds, "phases": times.to_json()}
        self.job.folder.append_metrics(record)
        self.job.callbacks.record(record)


def _title(plan: Plan) -> str:
    """What the terminal calls the run."""
    if plan.noise_multiplier > 0:
        return plan.title
    # Where no contribution is bounded, nothing is left of the algorithm.
    return "no privacy" if plan.group_size >= ALL_EXAMPLES else f"{plan.title} without privacy"
