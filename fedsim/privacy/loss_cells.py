"""From a continuous privacy loss to two measures on a grid: one that dominates it, and one that it dominates.

With P against Q and L = log dP/dQ, the privacy curve is δ(ε) = E_P[(1 − e^{ε−L})₊], a convex function of z = e^{−L}
under P. Hence two moves of P-mass can only raise δ(ε), at every ε and after any composition: moving it to a larger
loss, and spreading it while keeping Σ p and Σ p·z = Σ q. The reverse moves can only lower it.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SLACK = 1e-6
"""Part of a grid step by which a merged loss may miss its grid point; charged to the lower bound."""
TINY = 1e-290
"""Below this a Q-probability has lost its precision, and mass is rounded instead of spread."""
UNDERFLOW = 1e-306
"""More than a Q-probability can have lost where floats end: libraries return 0 for tails somewhat above that."""
LARGEST_LOSS = 650.0
"""Above this Q-probabilities underflow, and mass is rounded instead of spread."""
EPS = float(np.finfo(float).eps)


@dataclass(frozen=True)
class LossCells:
    """Probabilities of the cells between neighbouring edges; the first cell lies below edges[0], the last above.

    Attributes:
        edges: Losses l_0 < … < l_n; evenly spaced but for a sketch.
        p: P-probability of each of the n + 2 cells.
        q: Q-probability of each.
        p_error: Bound on the absolute rounding error of each p.
        q_error: Same for q.
        loss_error: Bound on the error of each edge as a loss.
    """

    edges: Floats
    p: Floats
    q: Floats
    p_error: Floats
    q_error: Floats
    loss_error: float

    def __post_init__(self) -> None:
        for values in (self.p, self.q, self.p_error, self.q_error):
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise ArithmeticError("a probability of a cell of losses is negative or not a number")

    @property
    def spacing(self) -> float:
        """Distance of neighbouring edges."""
        return float((self.edges[-1] - self.edges[0]) / (len(self.edges) - 1))

    def swapped(self) -> "LossCells":
        """The same cells for Q against P."""
        return LossCells(
            edges=-self.edges[::-1],
            p=self.q[::-1],
            q=self.p[::-1],
            p_error=self.q_error[::-1],
            q_error=self.p_error[::-1],
            loss_error=self.loss_error,
        )


@dataclass(frozen=True)
class GridMeasure:
    """P-mass on evenly spaced losses, and at infinity. A lower bound's mass may sum to less than 1.

    Attributes:
        origin: Loss of the first mass.
        spacing: Distance of neighbouring losses.
        log_masses: Logarithm of the mass at each loss.
        infinite: Mass at loss ∞.
        shift: To be added to each loss before use (positive above, negative below): what rounding can have moved.
    """

    origin: float
    spacing: float
    log_masses: Floats
    infinite: float
    shift: float

    @cached_property
    def losses(self) -> Floats:
        """The loss of each mass."""
        return self.origin + self.spacing * np.arange(len(self.log_masses), dtype=np.float64)


@dataclass(frozen=True)
class LossSketch:
    """A measure that dominates a loss, on unevenly spaced losses: small, and close wherever mass lies.

    Attributes:
        losses: The finite losses.
        log_masses: Logarithm of the mass at each.
        infinite: Mass at loss ∞.
        shift: To be added to each loss before use.
    """

    losses: Floats
    log_masses: Floats
    infinite: float
    shift: float


def sketch(cells: LossCells) -> LossSketch:
    """The dominating measure of cells of any widths."""
    return LossSketch(cells.edges, _logs(_connected(cells)), _beyond(cells), _edge_error(cells))


def dominating_measure(cells: LossCells) -> GridMeasure:
    """Connect the dots (Doroshenko et al. 2022): each cell spread to its two edges, keeping its P- and Q-mass."""
    log_masses = _logs(_connected(cells))
    return GridMeasure(float(cells.edges[0]), cells.spacing, log_masses, _beyond(cells), _edge_error(cells))


def dominated_measure(cells: LossCells, bottom: int, top: int) -> GridMeasure:
    """Cells merged by threes, each triple put on its two inner edges.

    Merging outputs is post-processing. A triple's merged loss is then spread to the two inner edges, which the
    triple's own spread covers (checked for each one); where it does not, the merged loss is rounded down. What lies
    above the last edge is left out: little in P, but the tilt of a composition can make it most of the mass.

    Args:
        cells: The cells, n + 2 of them.
        bottom: How many of the first cells to merge into one, at least 1.
        top: How many of the last cells are no triples, at least 1: the last is left out and the others are merged;
            the rest must be a multiple of three.
    """
    masses = np.zeros(len(cells.edges))
    last = len(cells.p) - top
    ends = [slice(0, bottom), slice(last, -1)]
    _round_down(
        cells,
        masses,
        *(np.array([part[end].sum() for end in ends]) for part in (cells.p, cells.q, cells.p_error, cells.q_error)),
        at_least=np.array([-1, last - 1]),
    )
    _place_triples(cells, masses, bottom, last)
    shift = -_edge_error(cells) - SLACK * cells.spacing
    return GridMeasure(float(cells.edges[0]), cells.spacing, _logs(masses), 0.0, shift)


def _connected(cells: LossCells) -> Floats:
    """Mass at each edge: each inner cell's at its lower and upper one; what rounding leaves open goes up."""
    p, q = cells.p[1:-1], cells.q[1:-1]
    scale: Floats = np.exp(np.minimum(cells.edges[:-1], LARGEST_LOSS))
    error = cells.p_error[1:-1] + scale * cells.q_error[1:-1] + 4 * p * _edge_error(cells)
    upper = np.clip((p - scale * q + error) / -np.expm1(-np.diff(cells.edges)), 0, p)
    upper = np.where((q > TINY) & (cells.edges[:-1] < LARGEST_LOSS), upper, p)
    masses = np.zeros(len(cells.edges))
    masses[:-1] += p - upper
    masses[1:] += upper + cells.p_error[1:-1]
    masses[0] += cells.p[0] + cells.p_error[0]
    return masses


def two_points(
    p: Floats, z: Floats, p_error: Floats, error: Floats, next_z: float
) -> tuple[Floats, NDArray[np.bool_]]:
    """Mass of triples of cells for the upper of their two inner edges, and whether both edges may have it all.

    The two points then have the triple's P-mass and its mean of z = e^{−loss}, in units where z is 1 at the lower
    inner edge. They may have it where the triple's own spread covers theirs: E(κ − z)₊ of the triple stays above that
    of the two points for κ between their z. The tangents at both ends, whose slopes are tail probabilities, bound the
    triple's from below.

    Args:
        p: Mass of each cell, float64 [triples, 3].
        z: Σ mass · z of each cell, float64 [triples, 3].
        p_error: Bound on the rounding error of each triple's mass.
        error: Bound on that of its Σ mass · z.
        next_z: z at the upper inner edge.
    """
    total, tail = p.sum(axis=1), p[:, 1] + p[:, 2]
    upper = (total - z.sum(axis=1) - error) / (1 - next_z)
    good = (upper >= 0) & (upper <= total - p_error)
    at_upper = np.maximum(next_z * p[:, 2] - z[:, 2] - error, 0)
    at_lower = tail - z[:, 1] - z[:, 2] - error
    slope_upper, slope_lower = np.maximum(p[:, 2] - p_error, 0), tail + p_error
    with np.errstate(divide="ignore", invalid="ignore"):
        meet = (at_lower - slope_lower * (1 - next_z) - at_upper) / (slope_upper - slope_lower)
    meet = np.clip(np.nan_to_num(meet), 0, 1 - next_z)
    covered = np.maximum(at_upper + slope_upper * meet, at_lower - slope_lower * (1 - next_z - meet))
    return upper, good & ((upper * meet <= covered) | (upper <= slope_upper))


def _place_triples(cells: LossCells, masses: Floats, start: int, stop: int) -> None:
    p, q, p_errors = (part[start:stop].reshape(-1, 3) for part in (cells.p, cells.q, cells.p_error))
    p_error, q_error = p_errors.sum(axis=1), cells.q_error[start:stop].reshape(-1, 3).sum(axis=1)
    # Cell i ends at edge i.
    first = start + 3 * np.arange(len(p))
    near = cells.edges[np.minimum(first + 1, len(cells.edges) - 1)] < LARGEST_LOSS
    scale = np.exp(np.minimum(cells.edges[first], LARGEST_LOSS))
    error = p_error + q_error * scale + 4 * p.sum(axis=1) * _edge_error(cells)
    upper, good = two_points(p, q * scale[:, None], p_error, error, float(np.exp(-cells.spacing)))
    good &= (q.min(axis=1) > TINY) & near
    masses[first[good]] += (p.sum(axis=1) - p_error - upper)[good]
    masses[first[good] + 1] += upper[good]
    merged, each = ~good & near, ~near
    sums = p.sum(axis=1), q.sum(axis=1), p_error, q_error
    _round_down(cells, masses, *(part[merged] for part in sums), at_least=first[merged] - 1)
    # A cell's losses lie above its lower edge: where Q has underflowed nothing else is known.
    for place in range(3):
        lower = first[each] - 1 + place
        np.add.at(masses, lower[lower >= 0], np.maximum(p - p_errors, 0)[each, place][lower >= 0])


def _round_down(
    cells: LossCells,
    masses: Floats,
    p: Floats,
    q: Floats,
    p_error: Floats,
    q_error: Floats,
    *,
    at_least: NDArray[np.int_],
) -> None:
    """Put each merged (p, q) on the grid point at or below its loss; below the grid it is dropped.

    The loss is also known to lie above all cells that were merged: above the edge `at_least`.
    """
    low = np.maximum(p - p_error, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = np.where(low > 0, np.log(low) - np.log(q + q_error + UNDERFLOW), -np.inf)
    place = np.minimum(np.floor((loss - cells.edges[0]) / cells.spacing + SLACK), len(masses) - 1)
    place = np.maximum(place, at_least)
    kept = place >= 0
    np.add.at(masses, place[kept].astype(int), low[kept])


def _beyond(cells: LossCells) -> float:
    return min(float(cells.p[-1] + cells.p_error[-1]), 1.0)


def _logs(masses: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        logs: Floats = np.log(masses)
    return logs


def _edge_error(cells: LossCells) -> float:
    return cells.loss_error + 4 * EPS * float(np.abs(cells.edges[[0, -1]]).max())
