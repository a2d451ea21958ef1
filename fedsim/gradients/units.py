"""Which rows form a unit, and with what coefficient each row's loss enters its unit's update."""

from dataclasses import dataclass

import numpy as np

from fedsim.errors import InvalidInput
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
