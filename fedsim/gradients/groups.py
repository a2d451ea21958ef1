"""How the rows of one micro-batch belong to units."""

from dataclasses import dataclass

import numpy as np
import torch


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
        return self.units.stop - self.units.start

    def by_unit(self, batch: torch.Tensor) -> torch.Tensor:
        """The group's part of [rows of the batch, n, d] as [units, rows_per_unit · n, d]."""
        part = batch[self.rows]
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
