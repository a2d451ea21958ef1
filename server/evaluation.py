"""Held-out users, measured through the grid."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from fedsim.engine.evaluation_messages import EvaluateReply, EvaluateRequest
from fedsim.engine.messages import EVALUATE, parameters_record, refusal_in
from fedsim.engine.same_inputs import Inputs
from fedsim.engine.work import Vector
from fedsim.errors import Failure
from fedsim.models.evaluate import EvaluationByUnit
from fedsim.randomness import stream
from fedsim.rows import SizedUsers, Splits
from server.packing import Roster

FEW_USERS, DRAWN_AT_ONCE = 1 << 16, 1 << 10
"""Held-out users up to which all are put in order at once, and how many are drawn at a time where there are more."""


class EvaluationFailed(Failure):
    """Held-out users could not be evaluated."""


class HeldOutDiverged(Failure):
    """Held-out users have no finite loss: what follows would be spent on a model that is lost.

    Attributes:
        round: Rounds done.
        loss: What was measured.
        epsilon: User-level ε spent so far.
    """

    def __init__(self, round: int, loss: float, epsilon: float) -> None:
        self.round, self.loss, self.epsilon = round, loss, epsilon
        if round:
            spent = f"ε = {epsilon:.3f} is spent, and nothing more will be" if epsilon < math.inf else "training stops"
            what = (
                f"{spent}. The checkpoint before it is kept; begin a new run with a lower --optimizer.learning-rate."
            )
        else:
            what = "nothing is charged. Look at the weights of --model.path, or set --engine.precision float32."
        super().__init__(f"round {round}: the held-out loss is {loss}: {what}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.round, self.loss, self.epsilon)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What held-out users show of a model.

    Attributes:
        loss: Mean loss over predicted tokens (or rows, for classification), nats.
        accuracy: Share of them predicted right.
        perplexity: exp(loss); infinity where that overflows.
        user_losses: Mean loss of each user evaluated, float64 [users].
        users: The users evaluated, int64 [users].
    """

    loss: float
    accuracy: float
    perplexity: float
    user_losses: np.ndarray
    users: np.ndarray

    @classmethod
    def of_rows(cls, view: SizedUsers, rows: np.ndarray, measured: EvaluationByUnit) -> "Measurement":
        """What is known of each row, gathered by the user that owns it.

        Args:
            view: The split.
            rows: int64 [rows], numbers in it.
            measured: Of each of these rows.
        """
        owners = np.searchsorted(view.user_offsets, rows, side="right") - 1
        users, position = np.unique(owners, return_inverse=True)
        by_user = measured.by_unit(position, len(users))
        measurable = by_user.label_count > 0
        total = by_user.total
        return cls(
            loss=total.loss,
            accuracy=total.accuracy,
            perplexity=total.perplexity,
            user_losses=by_user.losses[measurable],
            users=users[measurable],
        )


def held_out_rows(view: SizedUsers, most: int, seed: int = 0) -> np.ndarray:
    """Rows of whole users, in keyed order of the users, until most rows are reached (the last user is cut).

    Args:
        view: A held-out split of a UserStore.
        most: Most rows.
        seed: Which users come first; fixed, so that all arms of a comparison measure the same rows.

    Returns:
        Row indices, sorted, int64.
    """
    if most >= view.num_rows:
        return np.arange(view.num_rows, dtype=np.int64)
    offsets = view.user_offsets
    chosen: list[np.ndarray] = []
    left = most
    for user in _in_keyed_order(view.num_users, stream(seed, "held-out")):
        rows = np.arange(offsets[user], min(offsets[user + 1], offsets[user] + left))
        chosen.append(rows)
        left -= len(rows)
        if left == 0:
            break
    return np.sort(np.concatenate(chosen)).astype(np.int64) if chosen else np.zeros(0, dtype=np.int64)


def _in_keyed_order(num_users: int, generator: np.random.Generator) -> Iterator[int]:
    """All users, each once, every order equally likely; of many users the first ones come without the others' order.

    A user is drawn uniformly, and again where it came before: a few times at most until half of all have come.
    """
    if num_users <= FEW_USERS:
        yield from generator.permutation(num_users).tolist()
        return
    came: set[int] = set()
    while 2 * len(came) < num_users:
        for user in generator.integers(num_users, size=DRAWN_AT_ONCE).tolist():
            if user not in came:
                came.add(user)
                yield user
    others = np.setdiff1d(np.arange(num_users), np.fromiter(came, dtype=np.int64), assume_unique=True)
    yield from generator.permutation(others).tolist()


class WorkersDiffer(EvaluationFailed):
    """Some workers hold other data or another base model.

    Attributes:
        refusals: What each of them said, by its id.
    """

    def __init__(self, refusals: dict[int, str]) -> None:
        self.refusals = refusals
        super().__init__("; ".join(f"worker {worker} refuses: {reason}" for worker, reason in refusals.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.refusals,)


def evaluate(
    roster: Roster,
    view: SizedUsers,
    split: str,
    rows: np.ndarray,
    parameters: Vector,
    *,
    inputs: Inputs | None = None,
) -> Measurement:
    """Measure a model on held-out rows, shared out over the workers.

    The result does not depend on how many they are, nor on which answers first.

    Args:
        roster: The workers.
        view: The split.
        split: Its name.
        rows: int64 [rows], ascending numbers in it, each once.
        parameters: The model's, float32 [P].
        inputs: What data and base model these are of; None where the workers share this process's.

    Raises:
        EvaluationFailed: When there is nobody to be evaluated, no worker, or one that does not answer.
        WorkersDiffer: When some hold other data or another base model: all of these are named.
    """
    if not len(rows):
        raise EvaluationFailed(f"there are no {split} users to evaluate on: raise --data.{split}-fraction")
    workers = roster.workers()
    if not workers:
        lost = "".join(f"; {reason}" for reason in roster.left_out)
        raise EvaluationFailed(f"evaluation on {split} users: no worker has come up in {roster.patience:g} s{lost}")
    shares = [share for share in np.array_split(rows, len(workers)) if len(share)]
    shared = parameters_record(parameters)
    messages = [
        Message(
            EvaluateRequest(split=split, rows=share, parameters=parameters, shared=shared, inputs=inputs).to_record(),
            worker,
            EVALUATE,
        )
        for worker, share in zip(workers, shares, strict=False)
    ]
    answers = list(roster.grid.send_and_receive(messages))
    given = {answer.metadata.src_node_id: refusal_in(answer.content) for answer in answers if answer.has_content()}
    if refusals := {worker: reason for worker, reason in sorted(given.items()) if reason is not None}:
        raise WorkersDiffer(refusals)
    replies = [_reply(message) for message in answers]
    answered = np.concatenate([np.empty(0, np.int64), *(reply.rows for reply in replies)])
    order = np.argsort(answered, kind="stable")
    if not np.array_equal(answered[order], rows):
        raise EvaluationFailed(f"evaluation on {split} users: not every worker answered")
    measured = EvaluationByUnit(
        loss_sum=np.concatenate([reply.loss_sum for reply in replies])[order],
        label_count=np.concatenate([reply.label_count for reply in replies])[order],
        correct=np.concatenate([reply.correct for reply in replies])[order],
        rows=np.ones(len(rows), np.int64),
    )
    return Measurement.of_rows(view, rows, measured)


def _reply(message: Message) -> EvaluateReply:
    if message.has_error():
        raise EvaluationFailed(f"evaluation on worker {message.metadata.src_node_id}: {message.error.reason}")
    worker = f"evaluation on worker {message.metadata.src_node_id}"
    try:
        reply = EvaluateReply.from_record(message.content)
    except Exception as failure:  # whatever reading it raises, as of training replies
        raise EvaluationFailed(f"{worker}: it is no reply ({type(failure).__name__}: {failure})") from failure
    if len({len(array) for array in (reply.rows, reply.loss_sum, reply.label_count, reply.correct)}) > 1:
        raise EvaluationFailed(f"{worker}: its arrays differ in length")
    if ((reply.correct < 0) | (reply.correct > reply.label_count)).any():
        raise EvaluationFailed(f"{worker}: it counts more labels predicted than labels, or fewer than none")
    return reply


class HeldOut:
    """The held-out users of a run.

    Args:
        grid: Where the workers are.
        store: The user store.
        max_rows: Most validation rows.
        test_rows: Most test rows.
        inputs: What data and base model the run is of; None where the workers share this process's.
        validation_rows: Rows of validation users to measure, int64, instead of so many as max_rows.
        roster: Who can be asked; by default all of the grid's workers. One that differs ends the run before its first
            round, and is left out after it.
    """

    def __init__(
        self,
        grid: Grid,
        store: Splits,
        max_rows: int,
        test_rows: int,
        inputs: Inputs | None = None,
        roster: Roster | None = None,
        validation_rows: np.ndarray | None = None,
    ) -> None:
        self._roster = Roster(grid) if roster is None else roster
        self._inputs = inputs
        self._splits = {name: store.split(name) for name in ("validation", "test")}
        most = {"validation": max_rows, "test": test_rows}
        self._rows = {name: held_out_rows(view, most[name]) for name, view in self._splits.items()}
        if validation_rows is not None:
            self._rows["validation"] = validation_rows

    def validation(self, parameters: Vector) -> Measurement:
        """The model of these parameters, float32 [P], on validation users: while training."""
        return self._measured("validation", parameters)

    def test(self, parameters: Vector) -> Measurement:
        """The same on test users: before and after."""
        return self._measured("test", parameters)

    def _measured(self, split: str, parameters: Vector) -> Measurement:
        while True:
            try:
                view, rows = self._splits[split], self._rows[split]
                return evaluate(self._roster, view, split, rows, parameters, inputs=self._inputs)
            except WorkersDiffer as differing:
                if not self._roster.training:
                    raise
                for worker, reason in differing.refusals.items():
                    self._roster.leave_out(worker, reason)
