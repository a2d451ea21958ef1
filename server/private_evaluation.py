"""Private evaluations of a run: who is measured, and what of it is charged, noised and told.

A held-out user is measured by a draw of their own, at a public rate, on the first rows that they own. Draws are
independent, so that one user more or fewer changes the law of the sum by that user's clipped change alone. They are
made by users' places, under the run's secret sampling seed: what knowing it would tell is in the statement.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedsim.config import EvaluationConfig
from fedsim.engine.work import Vector, on_host
from fedsim.privacy.held_out import PrivateEvaluation
from fedsim.privacy.ledger import NOTHING
from fedsim.privacy.mechanisms.noise import NoiseSource
from fedsim.privacy.splits import HELD_OUT, OfSplit
from fedsim.randomness import StreamNoise, stream
from fedsim.rows import SizedUsers
from fedsim.secure_noise import SecureNoise
from fedsim.seeds import Seeds
from server.budget import Charges
from server.evaluation import Measurement

EVALUATION, TOLD = "evaluation", "evaluation told"
"""Purposes of lines of the ledger: the charge of a private evaluation, and, at no charge, what it told of a model."""
LOSSES = "held-out losses before"
CERTAIN = 4.0
"""Standard deviations of its noise beyond which a released change is not noise."""


def users_measured(users: int, expected: int, seed: int) -> np.ndarray:
    """The users who are measured in all evaluations of a run, ascending, int64.

    Each joins by an independent draw; everybody, where as many are expected.

    Args:
        users: Held-out users, N.
        expected: How many are measured on average.
        seed: The run's sampling seed.
    """
    if expected >= users:
        return np.arange(users, dtype=np.int64)
    return np.flatnonzero(stream(seed, "private evaluation").random(users) < expected / users)


def rows_measured(view: SizedUsers, users: np.ndarray, most: int) -> np.ndarray:
    """The first rows of each of these users, at most so many of each, ascending, int64."""
    starts = view.user_offsets[users]
    counts = np.minimum(view.user_offsets[users + 1] - starts, most)
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.asarray(np.repeat(starts, counts) + within, dtype=np.int64)


def private_changes(
    config: EvaluationConfig, evaluation: PrivateEvaluation | None, view: SizedUsers, ledger: Charges, seeds: Seeds
) -> tuple["PrivateChanges | None", np.ndarray | None]:
    """What a run tells of its validation users privately, and the rows of these; nothing where nothing is told so."""
    if evaluation is None:
        return None, None
    users = users_measured(view.num_users, evaluation.users, seeds.sampling)
    rows = rows_measured(view, users, config.measured(view.num_users)[1])
    return PrivateChanges(evaluation, ledger, seeds, users), rows


class PrivateChanges:
    """What a run tells of its held-out users.

    Each value is told of one model: one that is asked for again, after a crash, is the one that was told. Another
    model of the same round is charged again and has noise of its own, as long as what is left of the evaluations
    leaves one for the last model.

    Args:
        evaluation: Clip, noise, and how many evaluations there are.
        ledger: Where they are charged.
        seeds: Noise comes from their noise seed, under a purpose of its own.
        users: Those measured, ascending, int64.
    """

    def __init__(self, evaluation: PrivateEvaluation, ledger: Charges, seeds: Seeds, users: np.ndarray) -> None:
        self.evaluation = evaluation
        self._ledger, self._seeds, self._users = ledger, seeds, users
        self._before: np.ndarray | None = None
        self.last: float | None = 0.0
        """The released value of the model evaluated last; None where none was left for it."""

    def told(self, round: int, measured: Measurement, parameters: Vector, *, last: bool) -> float | None:
        """How the held-out loss changed since the first call, released; charged before it is.

        Args:
            round: Rounds done.
            measured: Of this model, on the users measured.
            parameters: The model's, float32 [P].
            last: Whether no evaluation comes after it.

        Returns:
            Nats, below zero where held-out users are predicted better; 0 of the first model, which has changed nothing
            and is not charged; None where no evaluation is left for this model.
        """
        losses = self._losses(measured)
        if self._before is None:
            self._before, self.last = losses, 0.0
        else:
            self.last = self._released(round, losses - self._before, parameters, last)
        return self.last

    def _released(self, round: int, changes: np.ndarray, parameters: Vector, last: bool) -> float | None:
        model = hashlib.sha256(np.ascontiguousarray(on_host(parameters)).data).hexdigest()[:32]
        here = [entry for entry in self._ledger.entries if entry.round == round]
        notes = [json.loads(entry.note) for entry in here if entry.purpose == TOLD]
        for note in notes:
            if note["model"] == model:
                return float(note["change"])
        if sum(entry.purpose == EVALUATION for entry in here) == len(notes):  # no charge waits for its release
            charged = sum(entry.purpose == EVALUATION for entry in self._ledger.entries)
            if self.evaluation.count - charged < (1 if last else 2):
                return None
            event = OfSplit(event=self.evaluation.release_event, split=HELD_OUT)
            self._ledger.charge(event, round=round, purpose=EVALUATION)
        change = self.evaluation.release(changes, self._noise(round, len(notes)))
        note = json.dumps({"model": model, "change": change})
        self._ledger.charge(NOTHING, round=round, purpose=TOLD, note=note)
        return change

    def _noise(self, round: int, told: int) -> NoiseSource:
        """Of one release: of a round, and of how many were told of it before."""
        if self._seeds.noise is None:
            return SecureNoise(self.evaluation.resolution)
        return StreamNoise(self._seeds.noise, "private evaluation", round, told)

    def _losses(self, measured: Measurement) -> np.ndarray:
        """Of each user in order; 0 of those of whose rows nothing is predicted, by whatever model."""
        losses = np.zeros(len(self._users))
        losses[np.searchsorted(self._users, measured.users)] = measured.user_losses
        return losses

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What a resumed run needs: arrays and values."""
        return {} if self._before is None else {LOSSES: self._before}, {"private_change": self.last}

    def load_state(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Go on from what state() returned."""
        self._before = np.array(arrays[LOSSES]) if LOSSES in arrays else None
        self.last = values["private_change"]

    @property
    def alarm(self) -> tuple[str, str] | None:
        """What the last value gives away, by name and in a sentence."""
        std = self.evaluation.standard_deviation
        if self.last is None:
            return (
                "no-private-change",
                "evaluations of lost models are charged and used up what evaluation.private-epsilon allows: "
                "of this model no private change of the held-out loss is told.",
            )
        if self.last > CERTAIN * std:
            return (
                "held-out-worse",
                f"held-out users are predicted worse than before training, by {self.last:.3f} nats (released with "
                f"noise of standard deviation {std:.3f}): a new run may do with a lower --optimizer.learning-rate.",
            )
        return None
