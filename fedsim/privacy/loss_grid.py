"""Where the grid of losses lies for a pair, the two measures on it, and a sketch of the loss to plan by."""

import numpy as np

from fedsim.privacy.dominating_pairs import BracketedPair, LossPair
from fedsim.privacy.loss_cells import Floats, GridMeasure, LossCells, LossSketch, dominated_measure, dominating_measure
from fedsim.privacy.loss_cells import sketch as sketch_of

FEWEST_EDGES = 12
EVEN_EDGES = 500
GROWING_EDGES = 200
WIDE = 0.2
FINEST = 1e-8
"""The sketch's narrowest cell, relative to the range."""


def sketch(pair: LossPair, ends: tuple[float, float], *, swapped: bool) -> LossSketch:
    """A measure that dominates the pair's loss, on edges that are close together where the loss is close to a limit.

    The loss of a rarely sampled user is nearly constant, yet reaches far: even cells would see but one side of it.

    Args:
        pair: P against Q.
        ends: Losses (of P against Q) that the edges reach.
        swapped: Measure the loss of Q against P instead.
    """
    low, high = ends
    reach = high - low
    growing = np.geomspace(FINEST * reach, reach, GROWING_EDGES)
    edges = [np.linspace(low, high, EVEN_EDGES), *(center + growing for center in (0.0, max(pair.least_loss, low)))]
    together = np.unique(np.concatenate([*edges, -growing]))
    together = together[(together >= low) & (together <= high)]
    apart = np.append(True, np.diff(together) > FINEST / 4 * reach)
    cells = pair.cells(together[apart])
    if reach > WIDE * EVEN_EDGES:
        cells = pair.cells(_between(cells, FINEST / 4 * reach))
    return sketch_of(cells.swapped() if swapped else cells)


def _between(cells: LossCells, apart: float) -> Floats:
    """The edges of cells, and more where mass is: where cells are wide, each mass is rounded by their width."""
    weights = (cells.p[1:-1] + cells.q[1:-1]) / 2
    levels = np.cumsum(np.append(0.0, weights)) + np.linspace(0, 1e-9, len(cells.edges))
    more = np.interp(np.linspace(levels[0], levels[-1], 2 * EVEN_EDGES), levels, cells.edges)
    edges = np.unique(np.append(cells.edges, more))
    kept: Floats = edges[np.append(True, np.diff(edges) > apart)]
    return kept


def grid_measures(
    pair: LossPair, spacing: float, ends: tuple[float, float], *, swapped: bool
) -> tuple[GridMeasure, GridMeasure]:
    """A measure that dominates the pair's loss and one that it dominates, on one grid.

    Args:
        pair: P against Q.
        spacing: Distance of neighbouring losses.
        ends: Losses (of P against Q) that the grid must reach.
        swapped: Measure the loss of Q against P instead.
    """
    low, high = ends
    origin, bottom = _origin(pair, spacing, low)
    count = max(int(np.ceil((high - origin) / spacing)) + 1, FEWEST_EDGES, bottom + 4)
    edges = origin + spacing * np.arange(count, dtype=np.float64)
    above = pair.cells(edges)
    below = pair.cells_below(edges) if isinstance(pair, BracketedPair) else above
    top = 1 + (len(edges) - bottom) % 3
    if swapped:
        above, below, bottom, top = above.swapped(), below.swapped(), top, bottom
    return dominating_measure(above), dominated_measure(below, bottom, top)


def _origin(pair: LossPair, spacing: float, low: float) -> tuple[float, int]:
    """The first grid point, and how many of the first cells to merge.

    With probability w the user is absent from a release, and then much of the loss lies just above log w, often within
    less than a grid step. The grid is laid so that all of it, merged, falls on a grid point two steps below its end:
    at the end every cell of the grid begins, and the merged point costs nothing.
    """
    least = pair.least_loss
    if least < low - 2 * spacing:
        # A user who is absent on both sides leaves much of the loss at 0: triples are laid so that it lies within one.
        below = int(np.floor(low / spacing))
        return float(spacing * below), 1 + (-below - 1) % 3
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


def _merged_losses(cells: LossCells) -> Floats:
    """For each edge the loss of everything below it taken together."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(np.cumsum(cells.p[:-1])) - np.log(np.cumsum(cells.q[:-1]))
