"""One training step done in several ways on ragged rows: clipped by unit, without privacy, and as rivals do it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks.gradient_models import Size
from benchmarks.gradient_rivals import autocasting
from fedsim.clip import Clip
from fedsim.gradients import CausalLanguageModel, clipped_sum
from fedsim.gradients.head import fused_loss, plain_head
from fedsim.gradients.objective import Batch
from fedsim.rows import IGNORED_LABEL, TokenRows


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rows and whose they are.

    Attributes:
        name: What the case is called in tables.
        rows: The rows.
        unit_ids: int64 [rows].
    """

    name: str
    rows: TokenRows
    unit_ids: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens of the step, padding left out."""
        return int(self.rows.offsets[-1])


def uniform_case(size: Size, units: int, rows_per_unit: int, seed: int = 0) -> Case:
    """Units of equally many full rows."""
    counts = np.full(units, rows_per_unit)
    return _case(f"{units} x {rows_per_unit}", size, counts, np.full(counts.sum(), size.length), seed)


def ragged_case(size: Size, units: int, seed: int = 0) -> Case:
    """Units of 1 to 7 rows, each of an eighth of the length to all of it."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 8, units)
    return _case(f"{units} ragged", size, counts, rng.integers(size.length // 8, size.length + 1, counts.sum()), seed)


def _case(name: str, size: Size, counts: np.ndarray, lengths: np.ndarray, seed: int) -> Case:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.random.default_rng(seed + 1).integers(0, size.vocabulary, offsets[-1])
    rows = TokenRows(tokens=tokens, offsets=offsets)
    return Case(name=name, rows=rows, unit_ids=np.repeat(np.arange(len(counts)), counts))


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


def plain_step(model: torch.nn.Module, batches: list[Batch], rows: int, autocast: torch.dtype | None) -> None:
    """An ordinary step: the mean over rows of their mean label loss, gradients added up by autograd."""
    for batch in batches:
        with autocasting(batch.input_ids.device, autocast):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        losses = cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        ).view(batch.labels.shape)
        (losses.sum(1) / (batch.labels != IGNORED_LABEL).sum(1)).sum().div(rows).backward()
    for parameter in model.parameters():
        parameter.grad = None


def fused_step(model: torch.nn.Module, batches: list[Batch], rows: int, autocast: torch.dtype | None) -> None:
    """The same with the chunked loss of the fast path."""
    head = plain_head(model)
    assert head is not None
    for batch in batches:
        coefficients = 1 / ((batch.labels != IGNORED_LABEL).sum(1).float() * rows)
        with autocasting(batch.input_ids.device, autocast):
            loss, _ = fused_loss(model, head, batch, coefficients)
        loss.backward()
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


Step = Callable[[], object]


def out_of_memory(step: Step) -> bool:
    """Whether the step runs out of the device's memory; done once."""
    try:
        step()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return True
    return False
