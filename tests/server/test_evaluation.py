"""Held-out users, measured through a grid of mock clients whose losses are known functions of the row."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp
from mock_training import MockStore

from fedsim.engine.evaluation_messages import EvaluateReply, EvaluateRequest
from fedsim.engine.local import LocalGrid
from server.evaluation import EvaluationFailed, Measurement, evaluate, held_out_rows
from server.packing import Roster

STORE = MockStore(num_users=9, rows_per_user=4)
ROWS = np.arange(5, 30)


def honest(rows: np.ndarray) -> EvaluateReply:
    """Row r has r % 3 labels, none for a third of the rows, each of loss 0.1 · r; half of the others are right."""
    labels = rows % 3
    return EvaluateReply(rows=rows, loss_sum=0.1 * rows * labels, label_count=labels, correct=labels // 2)


def clients(reply: Callable[[np.ndarray], EvaluateReply] = honest) -> Callable[[], ClientApp]:
    def build() -> ClientApp:
        app = ClientApp()

        @app.evaluate()
        def answer(message: Message, context: Any) -> Message:
            rows = EvaluateRequest.from_record(message.content).rows
            return Message(reply(rows).to_record(), reply_to=message)

        return app

    return build


class LateGrid(LocalGrid):
    """Its workers come up at the third look, and answer last things first."""

    looks = 0

    def get_node_ids(self) -> list[int]:
        self.looks += 1
        return super().get_node_ids() if self.looks >= 3 else []

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        return super().send_and_receive(messages, timeout=timeout)[::-1]


def measure(grid: LocalGrid, rows: np.ndarray = ROWS, patience: float = 60.0) -> Measurement:
    return evaluate(Roster(grid, patience), STORE, "test", rows, np.zeros(4, np.float32))


@pytest.mark.parametrize("grid", [LocalGrid(clients(), workers=3), LateGrid(clients(), workers=40)])
def test_users_are_measured_whoever_measures_and_answers_first(grid: LocalGrid) -> None:
    found = measure(grid)
    labels = ROWS % 3
    assert found.loss == pytest.approx((0.1 * ROWS * labels).sum() / labels.sum())
    assert found.accuracy == pytest.approx((labels // 2).sum() / labels.sum())
    assert found.perplexity == math.exp(found.loss)
    assert found.users.tolist() == list(range(1, 8))
    user = ROWS // 4 == 3
    assert found.user_losses[2] == pytest.approx((0.1 * ROWS * labels)[user].sum() / labels[user].sum())
    assert (
        found.loss == measure(LocalGrid(clients())).loss
    )  # Bit for bit: rows are put in order before they are summed.


def test_users_without_a_label_are_left_out_and_a_huge_loss_does_not_overflow() -> None:
    def huge(rows: np.ndarray) -> EvaluateReply:
        labels = (rows >= 8).astype(np.int64)
        return EvaluateReply(rows=rows, loss_sum=1e6 * labels, label_count=labels, correct=0 * labels)

    found = measure(LocalGrid(clients(huge)))
    assert found.users.tolist() == list(range(2, 8))
    assert (found.loss, found.perplexity, found.accuracy) == (1e6, math.inf, 0.0)


def test_what_cannot_be_measured_ends_in_a_sentence() -> None:
    nobody = LocalGrid(clients())
    nobody.close()
    with pytest.raises(EvaluationFailed, match="no worker has come up in 0 s"):
        measure(nobody, patience=0.0)
    with pytest.raises(EvaluationFailed, match=r"raise --data.test-fraction"):
        measure(LocalGrid(clients()), rows=held_out_rows(MockStore(num_users=0), 10))
    with pytest.raises(EvaluationFailed, match="not every worker answered"):
        measure(LocalGrid(clients(lambda rows: honest(np.repeat(rows[:1], len(rows))))))
    with pytest.raises(EvaluationFailed, match="worker 1: its arrays differ in length"):
        measure(LocalGrid(clients(lambda rows: EvaluateReply(**{**vars(honest(rows)), "correct": rows[:1]}))))
    with pytest.raises(EvaluationFailed, match="evaluation on worker 1: ZeroDivisionError"):
        measure(LocalGrid(clients(lambda rows: 1 / 0)))  # type: ignore[arg-type,return-value]
