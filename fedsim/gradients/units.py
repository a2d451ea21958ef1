"""Which rows form a unit, which units share a micro-batch, and whose are vectors without an axis of rows."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from fedsim.errors import InvalidInput
from fedsim.gradients.model import keeps_half
from fedsim.gradients.objective import Objective
from fedsim.rows import TokenRows

WEIGHTINGS = ("examples", "tokens")


@dataclass(frozen=True, kw_only=True)
class Units:
    """Units of rows, with the rows that score no label left out.

    A unit's loss is Σ over its rows of coefficient · (sum of the row's label losses), which is the weighted mean.

    Attributes:
        rows: int64 [n], row indices, sorted by unit; unit u owns rows[offsets[u]:offsets[u + 1]].
        coefficients: float64 [n], aligned with rows.
        lengths: int64 [n], tokens of those rows.
        offsets: int64 [U + 1].
    """

    rows: np.ndarray
    coefficients: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> np.ndarray:
        """Rows of each unit, int64 [U]."""
        return np.diff(self.offsets)


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
    )


CPU_TOKENS = 1024
"""On a CPU larger micro-batches fall out of its caches and gain nothing."""
GPU_TOKENS = 32768
SHARE = 0.6
"""Of a GPU's free memory that a pass may take."""


_measured: WeakKeyDictionary[torch.nn.Module, dict[torch.dtype | None, tuple[int, float]]] = WeakKeyDictionary()
"""Of the largest pass so far, by model and autocast: its tokens, and the bytes that one of them took at the peak."""


def token_budget(
    model: torch.nn.Module, device: torch.device, max_tokens: int | None, autocast: torch.dtype | None = None
) -> int:
    """Tokens, padding included, that one micro-batch may hold.

    On a GPU the choice is SHARE of the free memory by what the model's passes have taken so far (`measured_pass`), and
    before the first by an estimate; should it still be too much, the fast path halves it and goes on.

    Raises:
        InvalidInput: max_tokens below 1.
    """
    if max_tokens is not None:
        if max_tokens < 1:
            raise InvalidInput("max_tokens", max_tokens, "at least 1, or None to choose by device")
        return max_tokens
    if device.type != "cuda":
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    _, measured = _measured.get(model, {}).get(autocast, (0, 0.0))
    each = measured or token_bytes(model, autocast)
    # A power of 2, so that the same units meet in a micro-batch from round to round.
    return 1 << int(math.log2(min(GPU_TOKENS, max(1, SHARE * free / each))))


def token_bytes(model: torch.nn.Module, autocast: torch.dtype | None) -> int:
    """An estimate of the bytes that one token's activations and their gradients take in a pass."""
    widths = sum(sum(p.shape) for p in model.parameters() if p.ndim == 2)
    # Inputs, outputs and their gradients, and about as much again in functions without parameters.
    return 4 * (2 if keeps_half(model, autocast) else 4) * widths


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


def split_rows(units: Units, unit: int, budget: int) -> list[np.ndarray]:
    """Positions into units.rows of one unit's rows, in parts of similar lengths that each fit the budget.

    A row longer than the budget is a part of its own.
    """
    positions = np.arange(units.offsets[unit], units.offsets[unit + 1])
    positions = positions[np.argsort(units.lengths[positions], kind="stable")]
    parts: list[np.ndarray] = []
    start = 0
    for stop in range(1, len(positions) + 1):
        # Sorted by length, so the next row would set the padded length of all.
        if stop == len(positions) or (stop + 1 - start) * units.lengths[positions[stop]] > budget:
            parts.append(positions[start:stop])
            start = stop
    return parts


def pack_units(units: Units, budget: int) -> tuple[list[np.ndarray], list[int]]:
    """Units that share a micro-batch, and units that get micro-batches of their own.

    Units of like rows are put together, so that little is padded. A unit is alone if two of it would not fit.
    """
    counts = units.counts
    longest = np.zeros(len(units), dtype=np.int64)
    np.maximum.at(longest, np.repeat(np.arange(len(units)), counts), units.lengths)
    present = np.flatnonzero(counts)
    large = 2 * counts * longest > budget
    order = present[~large[present]]
    order = order[np.lexsort((counts[order], longest[order]))]
    together: list[np.ndarray] = []
    start = rows = 0
    for place, unit in enumerate(order):
        # Sorted by length, so this unit's longest row is the padded length of all.
        if (rows + counts[unit]) * longest[unit] > budget:
            together.append(order[start:place])
            start, rows = place, 0
        rows += counts[unit]
    if start < len(order):
        together.append(order[start:])
    return together, present[large[present]].tolist()


@dataclass(frozen=True, kw_only=True)
class Group:
    """Units with equally many rows, next to each other in the micro-batch.

    Attributes:
        rows: Where the group's rows lie in the batch.
        units: Where its units lie among the micro-batch's units.
        rows_per_unit: Rows of each of its units.
    """

    rows: slice
    units: slice
    rows_per_unit: int

    @property
    def size(self) -> int:
        """Number of units."""
        return int(self.units.stop - self.units.start)

    def by_unit(self, batch: torch.Tensor) -> torch.Tensor:
        """The group's part of [rows of the batch, n, d] as [units, rows_per_unit · n, d]."""
        part = batch if len(batch) == self.rows.stop - self.rows.start else batch[self.rows]
        if self.rows_per_unit == 1 and part.ndim == 3:
            return part
        return part.reshape(self.size, -1, *part.shape[2:])


def groups_of(counts: np.ndarray) -> list[Group]:
    """Groups for units whose numbers of rows, [units], are sorted; unit after unit, rows lie end to end."""
    groups: list[Group] = []
    rows = units = 0
    for count, number in zip(*np.unique(counts, return_counts=True), strict=True):
        groups.append(
            Group(
                rows=slice(rows, rows + int(count * number)),
                units=slice(units, units + int(number)),
                rows_per_unit=int(count),
            )
        )
        rows, units = groups[-1].rows.stop, groups[-1].units.stop
    return groups


RESHAPES = frozenset({"view", "reshape", "flatten", "squeeze", "contiguous"})
"""Functions that keep elements in their order, the last axis fastest."""
POOLS = frozenset({"__getitem__", "select", "sum", "mean", "amax"})
"""Functions that leave one vector of each row."""
PRODUCTS = {"linear": 0, "layer_norm": 0, "rms_norm": 0, "matmul": 0, "__matmul__": 0, "mm": 0, "addmm": 1}
"""Functions that treat each vector of one argument alike, and which argument that is."""
POINTWISE = frozenset({
    "relu", "gelu", "silu", "mish", "elu", "selu", "leaky_relu", "softplus", "hardtanh", "tanh", "sigmoid", "softmax",
    "dropout", "abs", "neg", "exp", "log", "sqrt", "rsqrt", "square", "pow", "clamp", "add", "radd", "sub", "rsub",
    "mul", "rmul", "div", "truediv", "true_divide", "to", "type", "type_as", "float", "double", "half", "bfloat16",
    "clone", "detach", "masked_fill", "chunk", "split", "cat", "mean", "sum", "amax", "__getitem__",
})  # fmt: skip
"""Functions that make each vector of the vectors at the same place; in place or as operators, too."""


class RowOrder(TorchFunctionMode):
    """Within it, which two-dimensional tensors hold vectors of one row after the other.

    A layer called with [N, d] may be called with the tokens of all rows end to end, with one vector of each row, or
    with whatever tokens a router chose, in an order that depends on the data; N tells these apart only by luck, and
    no trial on other data can. So order is followed from where it is plain: [rows, …, d] reshaped, or pooled over the
    middle, and then any function that is known to keep the order. Everything else (indexing by a tensor, sorting) is
    unknown, which costs speed only. What is known of a tensor ends when it, or a view of it, is written to.

    Args:
        rows: Rows of the micro-batch, which three-dimensional tensors have first.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor) and result.ndim == 2 and self._keeps(name, args, kwargs or {}, result):
                self.mark(result)
        return results

    def mark(self, tensor: torch.Tensor) -> None:
        """Take the tensor for one in order."""
        tensor.__dict__["_row_order"] = (self, tensor._version)  # views of one storage share the version

    def known(self, tensor: torch.Tensor, ago: int = 0) -> bool:
        """Whether [N, d] is known to hold N / rows vectors of one row after the other, or was so many writes ago."""
        return bool(tensor.__dict__.get("_row_order") == (self, tensor._version - ago))

    def _keeps(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> bool:
        given = [a for arg in args for a in (arg if isinstance(arg, (tuple, list)) else (arg,))]
        source = given[PRODUCTS.get(name, 0)] if len(given) > PRODUCTS.get(name, 0) else None
        if not isinstance(source, torch.Tensor) or len(result) % self.rows:
            return False
        if name == "__getitem__" and not _keeps_first_axis(args[1]):
            return False
        if source.ndim > 2:
            pooled = name in POOLS and len(result) == self.rows
            return len(source) == self.rows and (pooled or name in RESHAPES)
        same = source.ndim == 2 and len(source) == len(result)
        if name in PRODUCTS or name in RESHAPES:
            return same and self.known(source)
        if name.strip("_") not in POINTWISE and name not in POINTWISE:
            return False
        given += kwargs.values()
        met = [a for a in given if isinstance(a, torch.Tensor) and a.ndim > 1 and len(a) > 1]
        # An operation in place has its own result among its arguments, one version on.
        on = int(name.endswith("_") and not name.endswith("__"))
        return bool(met) and all(len(a) == len(result) and self.known(a, on if a is result else 0) for a in met)


def _keeps_first_axis(index: Any) -> bool:
    """Whether x[index] keeps x's first axis as it is."""
    first, *others = index if isinstance(index, tuple) else (index,)
    whole = first is ... or (isinstance(first, slice) and first == slice(None))
    return whole and all(isinstance(i, (int, slice)) or i is ... for i in others)
