"""One training step of rows that people own: clipped by unit, or without privacy; and the rows it is measured on."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy, pad

from benchmarks.gradient_models import Size
from benchmarks.gradient_rivals import UnitBatch, autocasting
from fedsim.clip import Clip
from fedsim.gradients import CausalLanguageModel, clipped_sum
from fedsim.gradients.head import fused_loss, plain_head
from fedsim.gradients.objective import Batch
from fedsim.rows import IGNORED_LABEL, TokenRows

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rows and whose they are.

    Attributes:
        rows: The rows.
        unit_ids: int64 [rows], ascending.
    """

    rows: TokenRows
    unit_ids: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens of the step, padding left out."""
        return int(self.rows.offsets[-1])

    @property
    def units(self) -> int:
        """How many there are."""
        return len(np.unique(self.unit_ids))

    @property
    def most_rows(self) -> int:
        """Of one unit."""
        return int(np.bincount(self.unit_ids).max())

    @property
    def even(self) -> bool:
        """Whether all rows are of one length."""
        return bool((self.rows.lengths == self.rows.lengths[0]).all())

    def of_units(self, units: int) -> "Case":
        """The first so many."""
        chosen = np.flatnonzero(self.unit_ids < units)
        return Case(rows=self.rows.take(chosen), unit_ids=self.unit_ids[chosen])


def uniform_case(size: Size, units: int, rows_per_unit: int) -> Case:
    """Units of equally many rows, all of the model's length."""
    counts = np.full(units, rows_per_unit)
    return _case(size, counts, np.full(counts.sum(), size.length))


def ragged_case(size: Size, units: int, most: int) -> Case:
    """Units as uneven as people are, of up to `most` rows.

    Numbers of rows (median 10, before the cut to `most`) and lengths (median a third of the model's length) are
    log-normal, near those of Shakespeare's roles and their speeches.
    """
    rng = np.random.default_rng(1)
    counts = np.clip(rng.lognormal(np.log(10), 1.3, units), 1, most).astype(np.int64)
    lengths = np.clip(rng.lognormal(np.log(size.length / 3), 0.9, counts.sum()), 3, size.length).astype(np.int64)
    return _case(size, counts, lengths)


def _case(size: Size, counts: np.ndarray, lengths: np.ndarray) -> Case:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.random.default_rng(0).integers(0, size.vocabulary, offsets[-1])
    return Case(rows=TokenRows(tokens=tokens, offsets=offsets), unit_ids=np.repeat(np.arange(len(counts)), counts))


def padded_batches(case: Case, max_tokens: int, device: torch.device) -> list[Batch]:
    """The rows, longest last, in micro-batches of at most so many tokens with their padding."""
    order = np.argsort(case.rows.lengths, kind="stable")
    lengths = case.rows.lengths[order]
    batches, start = [], 0
    for stop in range(1, len(order) + 1):
        if stop == len(order) or (stop + 1 - start) * lengths[stop] > max_tokens:
            batches.append(CausalLanguageModel().collate(case.rows, order[start:stop], device, 0))
            start = stop
    return batches


def alike_batches(case: Case, max_tokens: int, device: torch.device) -> list[Batch]:
    """The rows in micro-batches of one shape, as a compiled step wants it: padded to the longest, empty rows added."""
    length = int(case.rows.lengths.max())
    rows = min(max(1, max_tokens // length), len(case.rows))
    batches = []
    for start in range(0, len(case.rows), rows):
        chosen = np.arange(start, min(start + rows, len(case.rows)))
        batch = CausalLanguageModel().collate(case.rows, chosen, device, 0)
        further = (0, length - batch.input_ids.shape[1], 0, rows - len(chosen))
        batches.append(
            Batch(
                input_ids=pad(batch.input_ids, further),
                attention_mask=None,
                labels=pad(batch.labels, further, value=IGNORED_LABEL),
            )
        )
    return batches


def unit_batches(case: Case, max_tokens: int, device: torch.device) -> list[UnitBatch]:
    """Whole units, those of longest rows last, in micro-batches of at most so many tokens or of one unit."""
    units = np.unique(case.unit_ids)
    rows_of = [np.flatnonzero(case.unit_ids == unit) for unit in units]
    longest = np.array([case.rows.lengths[rows].max() for rows in rows_of])
    batches: list[UnitBatch] = []
    chosen: list[np.ndarray] = []

    def close() -> None:
        batch = CausalLanguageModel().collate(case.rows, np.concatenate(chosen), device, 0)
        places = np.repeat(np.arange(len(chosen)), [len(rows) for rows in chosen])
        batches.append(UnitBatch(batch=batch, units=torch.from_numpy(places).to(device)))
        chosen.clear()

    for unit in np.argsort(longest, kind="stable"):
        if chosen and (sum(map(len, chosen)) + len(rows_of[unit])) * longest[unit] > max_tokens:
            close()
        chosen.append(rows_of[unit])
    close()
    return batches


def plain_step(model: torch.nn.Module, batches: list[Batch], rows: int, autocast: torch.dtype | None) -> None:
    """An ordinary step: the mean over rows of their mean label loss, gradients added up by autograd."""
    try:
        for batch in batches:
            with autocasting(batch.input_ids.device, autocast):
                logits = model(input_ids=batch.input_ids, use_cache=False).logits
            losses = cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED_LABEL,
                reduction="none",
            ).view(batch.labels.shape)  # fmt: skip
            (losses.sum(1) / _label_counts(batch)).sum().div(rows).backward()
    finally:
        _forget_gradients(model)


def fused_step(model: torch.nn.Module, batches: list[Batch], rows: int, autocast: torch.dtype | None) -> None:
    """The same with the chunked loss of the fast path."""
    head = plain_head(model)
    assert head is not None
    try:
        for batch in batches:
            with autocasting(batch.input_ids.device, autocast):
                loss, _ = fused_loss(model, head, batch, 1 / (_label_counts(batch).float() * rows))
            loss.backward()
    finally:
        _forget_gradients(model)


def _label_counts(batch: Batch) -> torch.Tensor:
    """Of each row; 1 for an empty one."""
    return (batch.labels != IGNORED_LABEL).sum(1).clamp(min=1)


def _forget_gradients(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def clipped_step(
    model: torch.nn.Module,
    case: Case,
    clip: Clip,
    autocast: torch.dtype | None,
    method: str,
    max_tokens: int | None,
    compiled: bool | None = None,
) -> torch.Tensor:
    """Ours; returns the sum."""
    return clipped_sum(
        model, case.rows, case.unit_ids, clip, objective=CausalLanguageModel(), method=method, autocast=autocast,
        max_tokens=max_tokens, compiled=compiled,
    ).total  # fmt: skip


def median_clip(model: torch.nn.Module, case: Case, autocast: torch.dtype | None, max_tokens: int | None) -> Clip:
    """A clip that bites for half of the units, as a tuned one does."""
    norms = clipped_sum(
        model, case.rows, case.unit_ids, Clip(norm=1.0), objective=CausalLanguageModel(), autocast=autocast,
        max_tokens=max_tokens, compiled=False,
    ).norms  # fmt: skip
    return Clip(norm=float(norms.median()))
