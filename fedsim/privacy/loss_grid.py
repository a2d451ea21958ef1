"""Where the grid of losses lies for a pair, and the two measures on it."""

import numpy as np

from fedsim.privacy.dominating_pairs import LossPair
from fedsim.privacy.loss_cells import GridMeasure, LossCells, dominated_measure, dominating_measure

FEWEST_EDGES = 12


def grid_measures(pair: LossPair, spacing: float, tail: float, *, swapped: bool) -> tuple[GridMeasure, GridMeasure]:
    """A measure that dominates the pair's loss and one that it dominates, on one grid.

    Args:
        pair: P against Q.
        spacing: Distance of neighbouring losses.
        tail: Probability that may lie beyond each end of the grid.
        swapped: Measure the loss of Q against P instead.
    """
    low, high = pair.loss_range(tail)
    origin, bottom = _origin(pair, spacing, low)
    count = max(int(np.ceil((high - origin) / spacing)) + 1, FEWEST_EDGES, bottom + 4)
    cells = pair.cells(origin + spacing * np.arange(count, dtype=np.float64))
    top = 1 + (len(cells.p) - bottom - 1) % 3
    if swapped:
        cells, bottom, top = cells.swapped(), top, bottom
    return dominating_measure(cells), dominated_measure(cells, bottom, top)


def _origin(pair: LossPair, spacing: float, low: float) -> tuple[float, int]:
    """The first grid point, and how many of the first cells to merge.

    With probability w the user is absent from a release, and then much of the loss lies just above log w, often within
    less than a grid step. The grid is laid so that all of it, merged, falls on a grid point two steps below its end:
    at the end every cell of the grid begins, and the merged point costs nothing.
    """
    least = pair.least_loss
    if least < low - 2 * spacing:
        return float(spacing * np.floor(low / spacing)), 1
    start, end = 2.0, 20.0
    for _ in range(5):
        cells = pair.cells(least + spacing * np.linspace(start, end, 65))
        reach = (cells.edges - _merged_losses(cells)) / spacing
        first = int(np.argmax(reach >= 2))
        if reach[first] < 2 or first == 0:
            return least - spacing, 1
        step = (end - start) / 64
        start, end = start + step * (first - 1), start + step * first
    below = int(np.ceil((cells.edges[first] - least) / spacing))
    return float(cells.edges[first] - below * spacing), below + 1


def _merged_losses(cells: LossCells) -> np.ndarray:
    """For each edge the loss of everything below it taken together."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(np.cumsum(cells.p[:-1])) - np.log(np.cumsum(cells.q[:-1]))
