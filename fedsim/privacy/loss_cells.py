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
EPS = float(np.finfo(float).eps)


@dataclass(frozen=True)
class LossCells:
    """Probabilities of the cells between neighbouring edges; the first cell lies below edges[0], the last above.

    Attributes:
        edges: Losses l_0 < … < l_n, evenly spaced.
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
        origin: Loss of masses[0].
        spacing: Distance of neighbouring losses.
        masses: Mass at each loss.
        infinite: Mass at loss ∞.
        shift: To be added to each loss before use (positive above, negative below): what rounding can have moved.
    """

    origin: float
    spacing: float
    masses: Floats
    infinite: float
    shift: float

    @cached_property
    def losses(self) -> Floats:
        """The loss of each mass."""
        return self.origin + self.spacing * np.arange(len(self.masses), dtype=np.float64)

    @cached_property
    def log_masses(self) -> Floats:
        """Logarithm of each mass."""
        with np.errstate(divide="ignore"):
            return np.log(self.masses)


def dominating_measure(cells: LossCells) -> GridMeasure:
    """Connect the dots (Doroshenko et al. 2022): each cell spread to its two edges, keeping its P- and Q-mass."""
    lower, upper = _spread(cells)
    masses = np.zeros(len(cells.edges))
    masses[:-1] += lower
    masses[1:] += upper + cells.p_error[1:-1]
    masses[0] += cells.p[0] + cells.p_error[0]
    infinite = float(cells.p[-1] + cells.p_error[-1])
    return GridMeasure(float(cells.edges[0]), cells.spacing, masses, infinite, _edge_error(cells))


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
    )
    _place_triples(cells, masses, bottom, last)
    shift = -_edge_error(cells) - SLACK * cells.spacing
    return GridMeasure(float(cells.edges[0]), cells.spacing, masses, 0.0, shift)


def _spread(cells: LossCells) -> tuple[Floats, Floats]:
    """Mass at the lower and at the upper edge of each inner cell; what rounding leaves open goes up."""
    p, q = cells.p[1:-1], cells.q[1:-1]
    scale: Floats = np.exp(np.minimum(cells.edges[:-1], 700.0))
    error = cells.p_error[1:-1] + scale * cells.q_error[1:-1] + 4 * p * _edge_error(cells)
    upper = np.clip((p - scale * q + error) / -np.expm1(-cells.spacing), 0, p)
    upper = np.where(q > TINY, upper, p).astype(np.float64)
    return p - upper, upper


def _place_triples(cells: LossCells, masses: Floats, start: int, stop: int) -> None:
    p, q = (part[start:stop].reshape(-1, 3) for part in (cells.p, cells.q))
    p_error, q_error = (part[start:stop].reshape(-1, 3).sum(axis=1) for part in (cells.p_error, cells.q_error))
    # Cell i ends at edge i. In units where z = e^{−loss} is 1 at the lower inner edge, it is next_z at the upper one.
    first = start + 3 * np.arange(len(p))
    scale = np.exp(np.minimum(cells.edges[first], 700.0))
    next_z = np.exp(-cells.spacing)
    total, tail = p.sum(axis=1), p[:, 1] + p[:, 2]
    z_sums = q * scale[:, None]
    error = p_error + q_error * scale + 4 * total * _edge_error(cells)
    upper = (total - z_sums.sum(axis=1) - error) / (1 - next_z)
    good = (upper >= 0) & (upper <= total - p_error) & (q.min(axis=1) > TINY) & (cells.edges[first] < 700)
    # Spreading is covered if E(κ − z)₊ of the triple stays above that of the two points for κ between their z. The
    # tangents at both ends, whose slopes are tail probabilities, bound the triple's from below.
    at_upper = np.maximum(next_z * p[:, 2] - z_sums[:, 2] - error, 0)
    at_lower = tail - z_sums[:, 1] - z_sums[:, 2] - error
    slope_upper, slope_lower = np.maximum(p[:, 2] - p_error, 0), tail + p_error
    with np.errstate(divide="ignore", invalid="ignore"):
        meet = (at_lower - slope_lower * (1 - next_z) - at_upper) / (slope_upper - slope_lower)
    meet = np.clip(np.nan_to_num(meet), 0, 1 - next_z)
    covered = np.maximum(at_upper + slope_upper * meet, at_lower - slope_lower * (1 - next_z - meet))
    good &= (upper * meet <= covered) | (upper <= slope_upper)
    masses[first[good]] += (total - p_error - upper)[good]
    masses[first[good] + 1] += upper[good]
    bad = ~good
    _round_down(cells, masses, total[bad], q.sum(axis=1)[bad], p_error[bad], q_error[bad])


def _round_down(cells: LossCells, masses: Floats, p: Floats, q: Floats, p_error: Floats, q_error: Floats) -> None:
    """Put each merged (p, q) on the grid point at or below its loss; below the grid it is dropped."""
    low = np.maximum(p - p_error, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = np.where(low > 0, np.log(low) - np.log(q + q_error + 1e-320), -np.inf)
    place = np.minimum(np.floor((loss - cells.edges[0]) / cells.spacing + SLACK), len(masses) - 1)
    kept = place >= 0
    np.add.at(masses, place[kept].astype(int), low[kept])


def _edge_error(cells: LossCells) -> float:
    return cells.loss_error + 4 * EPS * float(np.abs(cells.edges[[0, -1]]).max())
