"""What is minimised: losses of rows, for language models with and without an encoder, and sequence classifiers."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fedsim.errors import InvalidInput
from fedsim.gradients.model import on_device
from fedsim.rows import IGNORED_LABEL, TokenRows, with_prompts


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows padded on the right to one length; or laid end to end as one, R = 1, where their places are given.

    Attributes:
        input_ids: int64 [R, T].
        attention_mask: int64 [R, T], 1 on real tokens; None where no row is padded or the objective needs none.
        labels: int64 [R, T - 1] (the token that each position predicts) or [R] (classes); IGNORED_LABEL is not scored.
        position_ids: int64 [R, T], each token's place in its row, told to the model; None where it counts itself.
        decoder_input_ids: int64 [R, L], what a decoder reads beside an encoder; its labels are [R, L].
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None
    decoder_input_ids: torch.Tensor | None = None


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
        return _language_losses(causal_logits(model, batch)[:, :-1], batch.labels)


@dataclass(frozen=True)
class SequenceToSequence:
    """Predict each token of a row's text from its prompt, which an encoder reads, and the text's tokens before it.

    `rows.labels` tell the two apart: tokens up to the first that counts are the prompt, the others the text, whose
    first token is predicted too. A row without a prompt scores nothing, for an encoder that reads padding alone would
    tell how long the rows beside it are.

    The model maps (input_ids [R, T], attention_mask [R, T], decoder_input_ids [R, L]) to logits [R, L, vocabulary] as
    `.logits` of a Hugging Face output. Texts are padded on the right and without a mask, as a decoder does not look
    ahead.

    Attributes:
        start: The token that a decoder reads before a text's first.
    """

    start: int

    def label_counts(self, rows: TokenRows) -> np.ndarray:
        texts = _text_starts(rows)
        scored = np.concatenate([[0], np.cumsum(_labels(rows) != IGNORED_LABEL)])
        counts: np.ndarray = np.where(texts > rows.offsets[:-1], scored[rows.offsets[1:]] - scored[texts], 0)
        return counts.astype(np.int64)

    def collate(self, rows: TokenRows, indices: np.ndarray, device: torch.device | str, pad_token: int = 0) -> Batch:
        begins, texts, ends = rows.offsets[:-1][indices], _text_starts(rows)[indices], rows.offsets[1:][indices]
        prompts, real = _filled(rows.tokens, begins, texts - begins, pad_token)
        unread = texts == begins
        real[unread, 0] = True  # an encoder must read something, though nothing is made of it
        written, _ = _filled(rows.tokens, texts, ends - texts, pad_token)
        labels, _ = _filled(_labels(rows), texts, ends - texts, IGNORED_LABEL)
        labels[unread] = IGNORED_LABEL
        written[:, 1:] = written[:, :-1].copy()
        written[:, 0] = self.start
        return Batch(
            input_ids=on_device(prompts, device),
            attention_mask=on_device(real.astype(np.int64), device),
            labels=on_device(labels, device),
            decoder_input_ids=on_device(written, device),
        )

    def row_losses(self, model: torch.nn.Module, batch: Batch) -> RowLosses:
        output = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            decoder_input_ids=batch.decoder_input_ids,
            use_cache=False,
        )
        return _language_losses(_logits(output), batch.labels)


@dataclass(frozen=True)
class SequenceClassification:
    """Predict one class a row, `rows.classes`; a row of class IGNORED_LABEL is not scored.

    The model maps (input_ids [R, T], attention_mask [R, T]) to logits [R, classes], either bare or as `.logits` of a
    Hugging Face output.

    Attributes:
        end_token: For models that read their answer at the last such token of a row, and refuse a batch whose rows
            have not equally many (T5, BART): every row is given `ends` of them, its last token among them, whatever
            its text. None leaves rows as they are.
        ends: How many of them a row has that nobody meddled with: more than one where they stand between a prompt and
            its text, too. Such rows keep them. Of others the last token becomes the end token; earlier ones stay that
            end the row's prompt, as many as are wanted, and any further become padding that is not masked; where there
            are fewer, the last tokens become what is lacking.
    """

    end_token: int | None = None
    ends: int = 1

    def label_counts(self, rows: TokenRows) -> np.ndarray:
        scored: np.ndarray = (_classes(rows) != IGNORED_LABEL) & (rows.lengths > 0)
        return scored.astype(np.int64)

    def collate(self, rows: TokenRows, indices: np.ndarray, device: torch.device | str, pad_token: int = 0) -> Batch:
        input_ids, real = _padded(rows, rows.tokens, indices, pad_token)
        if self.end_token is not None:
            lacking = ((0, 0), (0, max(0, self.ends - real.shape[1])))
            input_ids, real = np.pad(input_ids, lacking, constant_values=pad_token), np.pad(real, lacking)
            texts = rows.offsets[:-1] if rows.labels is None else _text_starts(rows)
            self._end(input_ids, real.sum(1), (texts - rows.offsets[:-1])[indices], pad_token)
        return Batch(
            input_ids=on_device(input_ids, device),
            attention_mask=on_device(real.astype(np.int64), device),
            labels=on_device(_classes(rows)[indices].astype(np.int64), device),
        )

    def _end(self, input_ids: np.ndarray, lengths: np.ndarray, prompts: np.ndarray, pad_token: int) -> None:
        """Give each row its end tokens, in place: what becomes of it depends on that row alone.

        Args:
            input_ids: int64 [R, T], padded on the right, T of at least `ends`.
            lengths: int64 [R], tokens of each row. One of fewer than `ends` has the others where the mask hides them.
            prompts: int64 [R], leading tokens of each row that are its prompt, with what ends it.
            pad_token: What an end token becomes that is one too many.
        """
        row, place = np.arange(len(input_ids))[:, None], np.arange(input_ids.shape[1])
        last = lengths.clip(min=1) - 1
        ended = (input_ids == self.end_token) & (place < last[:, None])
        input_ids[input_ids == self.end_token] = pad_token
        if within := self.ends - 1:
            stays = np.where(ended, place + (place < prompts[:, None]) * len(place), -1)
            enough = ended.sum(1) >= within
            last = np.where(enough, last, np.maximum(last, within))
            before = (last[:, None] - within) + np.arange(within)
            kept = np.argsort(-stays, axis=1, kind="stable")[:, :within]
            input_ids[row, np.where(enough[:, None], kept, before)] = self.end_token
        input_ids[row[:, 0], last] = self.end_token

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


def random_rows(objective: Objective, count: int, length: int, vocabulary: int) -> TokenRows:
    """Rows of random tokens, the same ones each time, of which the objective scores each: for measuring."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, count * length)
    classes = np.zeros(count, np.int64) if isinstance(objective, SequenceClassification) else None
    rows = TokenRows(tokens=tokens, offsets=np.arange(count + 1, dtype=np.int64) * length, classes=classes)
    return with_prompts(rows) if isinstance(objective, SequenceToSequence) else rows


def causal_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The model's logits [R, T, vocabulary], without a key-value cache."""
    # Hugging Face models build a cache unless told not to; other modules do not know the argument, whatever they call
    # their own config.
    config = getattr(model, "config", None)
    arguments: dict[str, object] = {"use_cache": False} if hasattr(config, "get_text_config") else {}
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


def _language_losses(logits: torch.Tensor, labels: torch.Tensor) -> RowLosses:
    """Losses of rows [R, L, vocabulary] at labels [R, L]."""
    losses = cross_entropy(
        logits.flatten(0, 1).float() if logits.dtype != torch.float64 else logits.flatten(0, 1),
        labels.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="none",
    ).view(labels.shape)
    scored = labels != IGNORED_LABEL
    right = _right(logits.detach(), labels) & scored
    return RowLosses(loss_sum=losses.sum(1), label_count=scored.sum(1), correct=right.sum(1))


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


def _labels(rows: TokenRows) -> np.ndarray:
    if rows.labels is None:
        hint = "Predicting a text from its prompt needs to know where the text begins."
        raise InvalidInput("rows.labels", None, "an integer array aligned with the tokens", hint)
    return rows.labels


def _text_starts(rows: TokenRows) -> np.ndarray:
    """Place of each row's first token that counts, or the row's end, int64 [rows]."""
    scored = np.concatenate([[0], np.cumsum(_labels(rows) != IGNORED_LABEL)])
    first = np.searchsorted(scored, scored[rows.offsets[:-1]] + 1) - 1
    starts: np.ndarray = np.minimum(first, rows.offsets[1:])
    return starts


def _padded(rows: TokenRows, values: np.ndarray, indices: np.ndarray, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """values of the chosen rows as int64 [R, T], filled on the right, and the mask of real places, bool [R, T]."""
    starts = rows.offsets[:-1][indices]
    return _filled(values, starts, rows.offsets[1:][indices] - starts, fill)


def _filled(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs of values as int64 [R, T], filled on the right, and the mask of real places, bool [R, T]."""
    place = np.arange(max(int(lengths.max(initial=1)), 1))
    real = place < lengths[:, None]
    padded = np.full(real.shape, fill, dtype=np.int64)
    padded[real] = values[(starts[:, None] + place)[real]]
    return padded, real
