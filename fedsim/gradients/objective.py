"""What is minimised: losses of rows, for causal language models and sequence classifiers."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fedsim.errors import InvalidInput
from fedsim.gradients.model import on_device
from fedsim.rows import IGNORED_LABEL, TokenRows


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows padded on the right to one length; or laid end to end as one, R = 1, where their places are given.

    Attributes:
        input_ids: int64 [R, T].
        attention_mask: int64 [R, T], 1 on real tokens; None where no row is padded or the objective needs none.
        labels: int64 [R, T - 1] (the token that each position predicts) or [R] (classes); IGNORED_LABEL is not scored.
        position_ids: int64 [R, T], each token's place in its row, told to the model; None where it counts itself.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class RowLosses:
    """Losses of the rows of a batch.

    Attributes:
        loss_sum: float [R], the sum of a row's label losses (cross-entropy in nats), differentiable.
        label_count: int64 [R], how many labels were scored.
        correct: int64 [R], for how many of them no logit is higher than the label's.
    """

    loss_sum: torch.Tensor
    label_count: torch.Tensor
    correct: torch.Tensor


class Objective(Protocol):
    """What the gradient engine asks of an objective."""

    def label_counts(self, rows: TokenRows) -> np.ndarray:
        """How many labels each row scores, int64 [rows]."""

    def collate(self, rows: TokenRows, indices: np.ndarray, device: torch.device | str, pad_token: int = 0) -> Batch:
        """The rows at indices as one padded batch on device."""

    def row_losses(self, model: torch.nn.Module, batch: Batch) -> RowLosses:
        """One forward pass; row r's losses depend on row r alone."""


@dataclass(frozen=True)
class CausalLanguageModel:
    """Predict each token of a row from those before it; the first token is never predicted.

    A row's labels are `rows.labels` where given, else its tokens. The model maps input_ids [R, T] to logits
    [R, T, vocabulary], either bare or as `.logits` of a Hugging Face output. Rows are padded on the right and no
    attention mask is passed: a causal model's real positions cannot see the padding behind them.
    """

    def label_counts(self, rows: TokenRows) -> np.ndarray:
        labels = rows.tokens if rows.labels is None else rows.labels
        scored = np.concatenate([[0], np.cumsum(labels != IGNORED_LABEL)])
        first = np.minimum(rows.offsets[:-1] + 1, rows.offsets[1:])
        counts: np.ndarray = scored[rows.offsets[1:]] - scored[first]
        return counts.astype(np.int64)

    def collate(self, rows: TokenRows, indices: np.ndarray, device: torch.device | str, pad_token: int = 0) -> Batch:
        input_ids, real = _padded(rows, rows.tokens, indices, pad_token)
        labels, _ = _padded(rows, rows.tokens if rows.labels is None else rows.labels, indices, IGNORED_LABEL)
        labels[~real] = IGNORED_LABEL
        return Batch(
            input_ids=on_device(input_ids, device),
            attention_mask=None,
            labels=on_device(np.ascontiguousarray(labels[:, 1:]), device),
        )

    def row_losses(self, model: torch.nn.Module, batch: Batch) -> RowLosses:
        logits = causal_logits(model, batch)[:, :-1]
        losses = cross_entropy(
            logits.flatten(0, 1).float() if logits.dtype != torch.float64 else logits.flatten(0, 1),
            batch.labels.flatten(),
            ignore_index=IGNORED_LABEL,
            reduction="none",
        ).view(batch.labels.shape)
        scored = batch.labels != IGNORED_LABEL
        right = _right(logits.detach(), batch.labels) & scored
        return RowLosses(loss_sum=losses.sum(1), label_count=scored.sum(1), correct=right.sum(1))


@dataclass(frozen=True)
class SequenceClassification:
    """Predict one class a row, `rows.classes`; a row of class IGNORED_LABEL is not scored.

    The model maps (input_ids [R, T], attention_mask [R, T]) to logits [R, classes], either bare or as `.logits` of a
    Hugging Face output.

    Attributes:
        end_token: For models that read their answer at the last such token of a row, and refuse a batch whose rows
            have not equally many (T5, BART): the last token of each row becomes this one, and earlier ones become
            padding that is not masked, so that every row has one, whatever its text. None leaves rows as they are.
    """

    end_token: int | None = None

    def label_counts(self, rows: TokenRows) -> np.ndarray:
        scored: np.ndarray = (_classes(rows) != IGNORED_LABEL) & (rows.lengths > 0)
        return scored.astype(np.int64)

    def collate(self, rows: TokenRows, indices: np.ndarray, device: torch.device | str, pad_token: int = 0) -> Batch:
        input_ids, real = _padded(rows, rows.tokens, indices, pad_token)
        if self.end_token is not None:
            input_ids[input_ids == self.end_token] = pad_token
            input_ids[np.arange(len(real)), real.sum(1).clip(min=1) - 1] = self.end_token
        return Batch(
            input_ids=on_device(input_ids, device),
            attention_mask=on_device(real.astype(np.int64), device),
            labels=on_device(_classes(rows)[indices].astype(np.int64), device),
        )

    def row_losses(self, model: torch.nn.Module, batch: Batch) -> RowLosses:
        logits = _logits(model(batch.input_ids, attention_mask=batch.attention_mask))
        losses = cross_entropy(
            logits if logits.dtype == torch.float64 else logits.float(),
            batch.labels,
            ignore_index=IGNORED_LABEL,
            reduction="none",
        )
        scored = batch.labels != IGNORED_LABEL
        right = _right(logits.detach(), batch.labels) & scored
        return RowLosses(loss_sum=losses, label_count=scored.long(), correct=right.long())


def causal_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The model's logits [R, T, vocabulary], without a key-value cache."""
    # Hugging Face models build a cache unless told not to; other modules do not know the argument.
    arguments: dict[str, object] = {"use_cache": False} if hasattr(model, "config") else {}
    if batch.position_ids is not None:
        arguments["position_ids"] = batch.position_ids
    return _logits(model(batch.input_ids, **arguments))


def token_losses(model: torch.nn.Module, batch: Batch) -> RowLosses:
    """Losses of a causal language model's packed rows, each token's by itself, [N] for a batch [1, N]."""
    logits = causal_logits(model, batch)
    labels = torch.nn.functional.pad(batch.labels, (0, 1), value=IGNORED_LABEL)[0]
    wide = logits[0] if logits.dtype == torch.float64 else logits[0].float()
    losses = cross_entropy(wide, labels, ignore_index=IGNORED_LABEL, reduction="none")
    scored = labels != IGNORED_LABEL
    correct = _right(logits[0].detach(), labels) & scored
    return RowLosses(loss_sum=losses, label_count=scored.long(), correct=correct.long())


def _right(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Where no logit is higher than the label's."""
    return logits.gather(-1, labels.clamp(min=0).unsqueeze(-1))[..., 0] >= logits.amax(-1)


def _logits(output: object) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits  # type: ignore[attr-defined]


def _classes(rows: TokenRows) -> np.ndarray:
    if rows.classes is None:
        raise InvalidInput(
            "rows.classes", None, "an integer array with one class a row", "Sequence classification needs labels."
        )
    return rows.classes


def _padded(rows: TokenRows, values: np.ndarray, indices: np.ndarray, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """values of the chosen rows as int64 [R, T], filled on the right, and the mask of real places, bool [R, T]."""
    starts = rows.offsets[:-1][indices]
    lengths = rows.offsets[1:][indices] - starts
    place = np.arange(max(int(lengths.max(initial=1)), 1))
    real = place < lengths[:, None]
    padded = np.full(real.shape, fill, dtype=np.int64)
    padded[real] = values[(starts[:, None] + place)[real]]
    return padded, real
