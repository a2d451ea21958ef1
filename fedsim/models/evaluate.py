"""Losses and accuracies of a model on rows, as sums that add up over workers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fedsim.gradients.head import chunk_positions, hidden_states, plain_head
from fedsim.gradients.model import autocasting, pad_token_of
from fedsim.gradients.objective import Batch, CausalLanguageModel, Objective, RowLosses, SequenceClassification
from fedsim.rows import IGNORED_LABEL, RowView, TokenRows

TOKENS_PER_BATCH = {"cpu": 2**10, "cuda": 2**14}
"""Tokens of one batch: on a CPU more fall out of its caches, a GPU is busy with fewer."""
LOGITS_PER_BATCH = {"cpu": 2**22, "cuda": 2**28}
"""Logits of one batch of a language model whose head cannot be taken apart from it, so that all are there at once:
16 MiB of float32 on a CPU and 1 GiB on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Sums over rows; two evaluations of different rows add up.

    Attributes:
        loss_sum: Cross-entropy summed over labels, nats.
        label_count: Labels scored: predicted tokens, or classified rows.
        correct: Labels that the highest logit got right.
        rows: Rows read.
    """

    loss_sum: float = 0.0
    label_count: int = 0
    correct: int = 0
    rows: int = 0

    def __add__(self, other: "Evaluation") -> "Evaluation":
        return Evaluation(
            loss_sum=self.loss_sum + other.loss_sum,
            label_count=self.label_count + other.label_count,
            correct=self.correct + other.correct,
            rows=self.rows + other.rows,
        )

    @property
    def loss(self) -> float:
        """Mean cross-entropy per label, nats; NaN where nothing was scored."""
        return self.loss_sum / self.label_count if self.label_count else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity where that overflows."""
        return math.exp(self.loss) if not self.loss > 700 else math.inf

    @property
    def accuracy(self) -> float:
        """Share of labels that the highest logit got right; NaN where nothing was scored."""
        return self.correct / self.label_count if self.label_count else math.nan


@dataclass(frozen=True, kw_only=True)
class EvaluationByUnit:
    """Sums over the rows of each unit (a user, say, or a single row), arrays of shape [units].

    Attributes:
        loss_sum: float64, cross-entropy summed over a unit's labels, nats.
        label_count: int64, labels scored.
        correct: int64, labels that the highest logit got right.
        rows: int64, rows read.
    """

    loss_sum: np.ndarray
    label_count: np.ndarray
    correct: np.ndarray
    rows: np.ndarray

    @property
    def losses(self) -> np.ndarray:
        """Mean cross-entropy per label of each unit, float64 [units]; NaN where a unit has no label."""
        return _ratio(self.loss_sum, self.label_count)

    @property
    def accuracies(self) -> np.ndarray:
        """Share of right labels of each unit, float64 [units]; NaN where a unit has no label."""
        return _ratio(self.correct, self.label_count)

    def by_unit(self, unit_ids: np.ndarray, units: int | None = None) -> "EvaluationByUnit":
        """Sums over coarser units.

        Args:
            unit_ids: Integers from 0, the coarser unit that each present one belongs to.
            units: Number of coarser units; by default one more than the highest id.
        """
        size = max(units or 0, int(unit_ids.max(initial=-1)) + 1)
        return EvaluationByUnit(
            loss_sum=np.bincount(unit_ids, self.loss_sum, size),
            label_count=np.bincount(unit_ids, self.label_count, size).astype(np.int64),
            correct=np.bincount(unit_ids, self.correct, size).astype(np.int64),
            rows=np.bincount(unit_ids, self.rows, size).astype(np.int64),
        )

    @property
    def total(self) -> Evaluation:
        """The sum over units."""
        return Evaluation(
            loss_sum=float(self.loss_sum.sum()),
            label_count=int(self.label_count.sum()),
            correct=int(self.correct.sum()),
            rows=int(self.rows.sum()),
        )

    @property
    def loss_standard_error(self) -> float:
        """Standard error of total.loss over the drawing of units, nats.

        Units, not labels, are independent, so it is that of a ratio of sums over units (delta method; Cochran 1977,
        section 6.4). NaN for fewer than two units.
        """
        return self._standard_error(self.loss_sum, self.total.loss)

    @property
    def accuracy_standard_error(self) -> float:
        """The same of total.accuracy."""
        return self._standard_error(self.correct, self.total.accuracy)

    def _standard_error(self, sums: np.ndarray, ratio: float) -> float:
        counted = self.label_count > 0
        units = int(counted.sum())
        if units < 2:
            return math.nan
        residuals = sums[counted] - ratio * self.label_count[counted]
        return float(np.sqrt(units / (units - 1) * (residuals**2).sum()) / self.label_count.sum())


def evaluate(
    model: torch.nn.Module,
    rows: TokenRows | RowView,
    objective: Objective,
    *,
    indices: np.ndarray | None = None,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
) -> Evaluation:
    """Loss and accuracy of the model on rows.

    The same rows give the same sums, whatever the batches and whoever computes which part, up to rounding within a
    row: of float32, or with autocast of bfloat16.

    Logits of a language model exist for some positions at a time, whatever the batch, unless its head does more than
    a product (`plain_head`).

    Args:
        model: In evaluation mode, on the device that is to be used.
        rows: Rows in memory, or a user store's view that looks them up batch by batch.
        objective: What is predicted.
        indices: Rows to read; by default all.
        max_tokens: Tokens of one batch, padding included; by default so many as a device has use for.
        device: Device of the model; by default that of its first parameter.
        autocast: bfloat16 runs the model in mixed precision. Losses are computed in float32 from its logits.

    Returns:
        Sums over the rows.

    Raises:
        InvalidInput: autocast is another dtype.
    """
    found = evaluate_rows(
        model, rows, objective, indices=indices, max_tokens=max_tokens, device=device, autocast=autocast
    )
    return found.by_unit(np.zeros(len(found.loss_sum), np.int64)).total


def evaluate_rows(
    model: torch.nn.Module,
    rows: TokenRows | RowView,
    objective: Objective,
    *,
    indices: np.ndarray | None = None,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    turn: tuple[int, int] = (0, 1),
) -> EvaluationByUnit:
    """As evaluate, for each row on its own: arrays aligned with indices (or with all rows).

    Args:
        turn: Of a model that a group of processes shares out: which of how many this one is. Batches are dealt out to
            them, a process that has none left does one again to keep in step, and rows of others are left at zero.
    """
    lengths = rows.lengths if isinstance(rows, TokenRows) else rows.row_lengths
    read = np.arange(len(lengths)) if indices is None else np.asarray(indices)
    place = torch.device(device) if device is not None else next(model.parameters()).device
    loss_sum = np.zeros(len(read))
    label_count = np.zeros(len(read), np.int64)
    correct = np.zeros(len(read), np.int64)
    head = plain_head(model) if type(objective) is CausalLanguageModel else None
    found: list[tuple[np.ndarray, RowLosses]] = []
    # Autocast keeps the weights that it has cast until it ends: once for all batches.
    with torch.inference_mode(), autocasting(place, autocast):
        batches = list(_batches(lengths[read], max_tokens or _default_max_tokens(model, objective, head, place)))
        rank, ranks = turn
        for first in range(0, len(batches), ranks):
            busy = first + rank < len(batches)
            places = batches[first + rank if busy else first]
            part, chosen = _look_up(rows, read[places])
            batch = objective.collate(part, chosen, place, pad_token_of(model))
            losses = objective.row_losses(model, batch) if head is None else _in_chunks(model, head, objective, batch)
            if busy:
                found.append((places, losses))
    for places, losses in found:  # a device has by now been asked for everything, and is waited for once
        loss_sum[places] = losses.loss_sum.double().cpu().numpy()
        label_count[places] = losses.label_count.cpu().numpy()
        correct[places] = losses.correct.cpu().numpy()
    return EvaluationByUnit(
        loss_sum=loss_sum, label_count=label_count, correct=correct, rows=np.ones(len(read), np.int64)
    )


def _in_chunks(model: torch.nn.Module, head: torch.nn.Linear, objective: Objective, batch: Batch) -> RowLosses:
    """`objective.row_losses`, of the head alone and of some positions at a time."""
    # Some models widen their logits: what the head was given comes out widened too.
    hidden, labels = hidden_states(model, head, batch).to(head.weight.dtype), batch.labels
    count, length = hidden.shape[:2]
    positions = chunk_positions(head.out_features, hidden.device)
    loss_sum = torch.zeros(count, dtype=torch.float64, device=hidden.device)
    correct = torch.zeros(count, dtype=torch.long, device=hidden.device)
    step = max(1, positions // length)
    for first in range(0, count, step):
        rows = slice(first, first + step)
        for start in range(0, length - 1, positions):
            stop = min(start + positions, length - 1)
            # A position predicts the token after it: the last one of a piece predicts nothing.
            piece = Batch(
                input_ids=hidden[rows, start : stop + 1], attention_mask=None, labels=labels[rows, start:stop]
            )
            losses = objective.row_losses(head, piece)
            loss_sum[rows] += losses.loss_sum
            correct[rows] += losses.correct
    return RowLosses(loss_sum=loss_sum, label_count=(labels != IGNORED_LABEL).sum(1), correct=correct)


def _batches(lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Places of rows of alike lengths, rows × longest within max_tokens, or a single row that is longer."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, max_tokens // max(1, int(lengths[order[start]])))
        yield order[start : start + size]
        start += size


def _default_max_tokens(
    model: torch.nn.Module, objective: Objective, head: torch.nn.Linear | None, device: torch.device
) -> int:
    tokens = TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cuda"])
    if head is not None or isinstance(objective, SequenceClassification):
        return tokens
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 4096)
    return max(1, min(tokens, LOGITS_PER_BATCH.get(device.type, LOGITS_PER_BATCH["cuda"]) // vocabulary))


def _look_up(rows: TokenRows | RowView, indices: np.ndarray) -> tuple[TokenRows, np.ndarray]:
    """Rows in memory and the indices to use in them."""
    return (rows, indices) if isinstance(rows, TokenRows) else (rows.take(indices), np.arange(len(indices)))


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    ratios = np.full(len(counts), np.nan)
    np.divide(sums, counts, out=ratios, where=counts > 0)
    return ratios
