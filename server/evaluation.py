"""Held-out users, measured through the grid."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from fedsim.engine.evaluation_messages import EvaluateReply, EvaluateRequest
from fedsim.engine.messages import EVALUATE
from fedsim.randomness import stream


class EvaluationFailed(RuntimeError):
    """A worker could not evaluate its share."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What held-out users show of a model.

    Attributes:
        loss: Mean loss over predicted tokens (or rows, for classification), nats.
        accuracy: Share of them predicted right.
        perplexity: exp(loss).
        user_losses: Mean loss of each user evaluated, float64 [users].
        users: The users evaluated, int64 [users].
    """

    loss: float
    accuracy: float
    perplexity: float
    user_losses: np.ndarray
    users: np.ndarray


def held_out_rows(view: Any, most: int, seed: int = 0) -> np.ndarray:
    """Rows of whole users, in keyed order of the users, until most rows are reached (the last user is cut).

    Args:
        view: A held-out split of a UserStore.
        most: Most rows.
        seed: Which users come first; fixed, so that all arms of a comparison measure the same rows.

    Returns:
        Row indices, sorted, int64.
    """
    offsets = view.user_offsets
    chosen: list[np.ndarray] = []
    left = most
    for user in stream(seed, "held-out").permutation(view.num_users):
        rows = np.arange(offsets[user], min(offsets[user + 1], offsets[user] + left))
        chosen.append(rows)
        left -= len(rows)
        if left == 0:
            break
    return np.sort(np.concatenate(chosen)).astype(np.int64) if chosen else np.zeros(0, dtype=np.int64)


def evaluate(grid: Grid, view: Any, split: str, rows: np.ndarray, parameters: ArrayRecord) -> Evaluation:
    """Measure a model on held-out rows, shared out over the workers.

    Raises:
        EvaluationFailed: When a worker does not answer.
    """
    nodes = list(grid.get_node_ids())
    shares = [share for share in np.array_split(rows, len(nodes)) if len(share)]
    messages = [
        Message(EvaluateRequest(split=split, rows=share, parameters=parameters).to_record(), node, EVALUATE)
        for node, share in zip(nodes, shares, strict=False)
    ]
    replies = [_reply(message) for message in grid.send_and_receive(messages)]
    if sum(len(reply.rows) for reply in replies) != len(rows):
        raise EvaluationFailed(f"evaluation on {split} users: not every worker answered")

    measured = np.concatenate([reply.rows for reply in replies])
    loss_sum = np.concatenate([reply.loss_sum for reply in replies])
    label_count = np.concatenate([reply.label_count for reply in replies])
    correct = np.concatenate([reply.correct for reply in replies])
    loss = float(loss_sum.sum() / label_count.sum())
    owners = np.searchsorted(view.user_offsets, measured, side="right") - 1
    users, position = np.unique(owners, return_inverse=True)
    user_labels = np.bincount(position, label_count)
    measurable = user_labels > 0
    return Evaluation(
        loss=loss,
        accuracy=float(correct.sum() / label_count.sum()),
        perplexity=float(np.exp(loss)),
        user_losses=np.bincount(position, loss_sum)[measurable] / user_labels[measurable],
        users=users[measurable],
    )


def _reply(message: Message) -> EvaluateReply:
    if message.has_error():
        raise EvaluationFailed(f"evaluation on worker {message.metadata.src_node_id}: {message.error.reason}")
    return EvaluateReply.from_record(message.content)
