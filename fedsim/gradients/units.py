"""Which rows form a unit, and which units share a micro-batch."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch

from fedsim.errors import InvalidInput
from fedsim.gradients.model import keeps_half
from fedsim.gradients.objective import Objective
from fedsim.rows import TokenRows

WEIGHTINGS = ("examples", "tokens")
SHORT_ROW = 64
"""Tokens of rows, on average, from which on they are packed whole: odd numbers of tokens would cost what is saved."""


@dataclass(frozen=True, kw_only=True)
class Units:
    """Units of rows, with the rows that score no label left out.

    A unit's loss is Σ over its rows of coefficient · (sum of the row's label losses), which is the weighted mean.

    Attributes:
        rows: int64 [n], row indices, sorted by unit; unit u owns rows[offsets[u]:offsets[u + 1]].
        coefficients: float64 [n], aligned with rows.
        lengths: int64 [n], tokens of those rows.
        offsets: int64 [U + 1].
        whole: Whether rows lie end to end with their last tokens, which predict nothing; of short rows these are many.
    """

    rows: np.ndarray
    coefficients: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    whole: bool = True

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> np.ndarray:
        """Rows of each unit, int64 [U]."""
        return np.diff(self.offsets)

    @property
    def packed_lengths(self) -> np.ndarray:
        """Tokens of each row where rows lie end to end, int64 [n]."""
        return self.lengths if self.whole else self.lengths - 1

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of each unit where rows lie end to end, int64 [U]."""
        before = np.concatenate([[0], np.cumsum(self.packed_lengths)])
        tokens: np.ndarray = before[self.offsets[1:]] - before[self.offsets[:-1]]
        return tokens

    @property
    def longest(self) -> np.ndarray:
        """Tokens of each unit's longest row, int64 [U]; 0 without rows."""
        longest = np.zeros(len(self), dtype=np.int64)
        np.maximum.at(longest, np.repeat(np.arange(len(self)), self.counts), self.lengths)
        return longest

    def positions(self, units: np.ndarray) -> np.ndarray:
        """Where in `rows` those of some units are, unit after unit."""
        starts, counts = self.offsets[:-1][units], self.counts[units]
        places: np.ndarray = np.arange(counts.sum()) + np.repeat(starts - np.cumsum(counts) + counts, counts)
        return places


def make_units(
    rows: TokenRows, unit_ids: np.ndarray, objective: Objective, weighting: str, weights: np.ndarray | None
) -> Units:
    """Units from one id a row.

    Args:
        rows: The rows.
        unit_ids: Integer [rows], values 0..U-1; a value that no row has is a unit with a zero update.
        objective: Counts the labels of a row.
        weighting: "examples": a unit's loss is the weighted mean over its rows of the row's mean label loss.
            "tokens": the weighted mean over its labels.
        weights: Non-negative float [rows], relative within a unit; None means equal.

    Raises:
        InvalidInput: Shapes or values outside the above.
    """
    if len(rows) == 0:
        raise InvalidInput("rows", "no rows", "at least one row", "Skip the call where a cohort is empty.")
    ids = np.asarray(unit_ids)
    if ids.shape != (len(rows),) or not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0:
        raise InvalidInput(
            "unit_ids", f"{ids.dtype} {ids.shape}", f"{len(rows)} integers from 0 upwards, one for each row"
        )
    if weighting not in WEIGHTINGS:
        raise InvalidInput("weighting", weighting, " or ".join(map(repr, WEIGHTINGS)))
    relative = np.ones(len(rows)) if weights is None else np.asarray(weights, dtype=np.float64)
    if relative.shape != ids.shape or not np.isfinite(relative).all() or (relative < 0).any():
        raise InvalidInput("weights", f"array of shape {relative.shape}", f"{len(rows)} finite numbers, none below 0")

    counts = objective.label_counts(rows)
    used = np.flatnonzero((counts > 0) & (relative > 0))
    used = used[np.argsort(ids[used], kind="stable")]
    number = int(ids.max()) + 1
    mass = relative * (counts if weighting == "tokens" else 1.0)
    # A row's loss is a sum over labels, so the mean over a row's labels divides by their number.
    share = relative / (1.0 if weighting == "tokens" else np.maximum(counts, 1))
    totals = np.bincount(ids[used], weights=mass[used], minlength=number)
    offsets = np.zeros(number + 1, dtype=np.int64)
    np.cumsum(np.bincount(ids[used], minlength=number), out=offsets[1:])
    return Units(
        rows=used,
        coefficients=share[used] / totals[ids[used]],
        lengths=rows.lengths[used],
        offsets=offsets,
        whole=bool(rows.lengths[used].sum() >= SHORT_ROW * len(used)),
    )


CPU_TOKENS = 1024, 4096
"""Tokens of a CPU's micro-batches: of most models, and of the smallest, whose operations take hardly longer than it
takes to start them."""
CPU_BYTES = 2**29
"""What the larger of these may take, by `token_bytes`."""
GPU_TOKENS = 32768
SHARE = 0.6
"""Of a GPU's free memory that a pass may take."""


_measured: WeakKeyDictionary[torch.nn.Module, dict[torch.dtype | None, tuple[int, float]]] = WeakKeyDictionary()
"""Of the largest pass so far, by model and autocast: its tokens, and the bytes that one of them took at the peak."""


def token_budget(
    model: torch.nn.Module, device: torch.device, max_tokens: int | None, autocast: torch.dtype | None = None
) -> int:
    """Tokens that one micro-batch may hold, padding included where rows are padded.

    On a CPU the choice is one of CPU_TOKENS. On a GPU it is SHARE of the free memory by what the model's passes have
    taken so far (`measured_pass`), and before the first by an estimate; should it still be too much, the fast path
    halves it and goes on.

    Raises:
        InvalidInput: max_tokens below 1.
    """
    if max_tokens is not None:
        if max_tokens < 1:
            raise InvalidInput("max_tokens", max_tokens, "at least 1, or None to choose by device")
        return max_tokens
    if device.type != "cuda":
        usual, larger = CPU_TOKENS
        return larger if larger * token_bytes(model, autocast) <= CPU_BYTES else usual
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    _, measured = _measured.get(model, {}).get(autocast, (0, 0.0))
    each = measured or token_bytes(model, autocast)
    # A power of 2, so that the same units meet in a micro-batch from round to round.
    return 1 << int(math.log2(min(GPU_TOKENS, max(1, SHARE * free / each))))


def token_bytes(model: torch.nn.Module, autocast: torch.dtype | None) -> int:
    """An estimate of the bytes that one token's activations and their gradients take in a pass."""
    # Quantised weights are packed, and keep their shape beside them.
    shapes = (getattr(getattr(p, "quant_state", None), "shape", p.shape) for p in model.parameters())
    widths = sum(sum(shape) for shape in shapes if len(shape) == 2)
    # Inputs, outputs and their gradients, and about as much again in functions without parameters.
    return 4 * (2 if keeps_half(model, autocast) else 4) * max(1, widths)


@contextmanager
def measured_pass(
    model: torch.nn.Module, device: torch.device, tokens: int, autocast: torch.dtype | None
) -> Iterator[None]:
    """Around a pass of so many tokens: remembers what memory a token took, if no pass before was as large.

    What a pass takes whatever its size (weights cast to bfloat16, the largest gradient) counts as the tokens' too, so
    that the figure falls as micro-batches grow, and errs to the safe side. torch's peak statistics begin anew with
    each pass that is measured.
    """
    known = _measured.setdefault(model, {})
    if device.type != "cuda" or tokens <= known.get(autocast, (0, 0.0))[0]:
        yield
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield
    known[autocast] = tokens, (torch.cuda.max_memory_allocated(device) - before) / tokens


def split_rows(units: Units, unit: int, budget: int, packed: bool = False) -> list[np.ndarray]:
    """Positions into units.rows of one unit's rows, in parts of similar lengths that each fit the budget.

    A row longer than the budget is a part of its own.

    Args:
        packed: Whether a part's rows lie end to end; else each is padded to the longest.
    """
    lengths = units.packed_lengths if packed else units.lengths
    positions = np.arange(units.offsets[unit], units.offsets[unit + 1])
    positions = positions[np.argsort(lengths[positions], kind="stable")]
    parts: list[np.ndarray] = []
    start = tokens = 0
    for stop, length in enumerate([*lengths[positions].tolist(), 0]):
        # Sorted by length, so this row would set the padded length of all.
        tokens = tokens + length if packed else (stop + 1 - start) * length
        if stop > start and (stop == len(positions) or tokens > budget):
            parts.append(positions[start:stop])
            start, tokens = stop, length
    return parts


def sharing_units(units: Units, budget: int, packed: bool = False) -> np.ndarray:
    """Units of which two would fit a micro-batch, so that they share it with others, int64.

    Args:
        packed: Whether rows lie end to end; else each is padded to the longest.
    """
    size = units.tokens if packed else units.counts * units.longest
    sharing: np.ndarray = np.flatnonzero((units.counts > 0) & (2 * size <= budget))
    return sharing


def pack_units(units: Units, budget: int, packed: bool = False) -> tuple[list[np.ndarray], list[int]]:
    """Units that share a micro-batch, and units that get micro-batches of their own.

    Units of like rows are put together, or of like tokens where rows are packed. A unit is alone if two of it would
    not fit.

    Args:
        packed: Whether a micro-batch's rows lie end to end; else each is padded to the longest.
    """
    counts, each, longest = units.counts, units.tokens, units.longest
    order = sharing_units(units, budget, packed)
    alone = np.setdiff1d(np.flatnonzero(counts), order)
    order = order[np.argsort(each[order], kind="stable") if packed else np.lexsort((counts[order], longest[order]))]
    together: list[np.ndarray] = []
    start = held = 0
    for place, unit in enumerate(order):
        # Sorted by length, so this unit's longest row is the padded length of all.
        size = held + each[unit] if packed else (held + counts[unit]) * longest[unit]
        if size > budget:
            together.append(order[start:place])
            start, held = place, 0
        held += each[unit] if packed else counts[unit]
    if start < len(order):
        together.append(order[start:])
    return together, alone.tolist()
