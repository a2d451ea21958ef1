"""From a continuous privacy loss to two measures on a grid: one that dominates it, and one that it dominates.

With P against Q and L = log dP/dQ, the privacy curve is δ(ε) = E_P[(1 − e^{ε−L})₊], a convex function of z = e^{−L}
under P. Hence two moves of P-mass can only raise δ(ε), at every ε and after any composition: moving it to a larger
loss, and spreading it while keeping Σ p and Σ p·z = Σ q. The reverse moves can only lower it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SLACK = 1e-6
"""Part of a grid step by which a merged loss may miss its grid point; charged to the lower bound."""


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

    @property
    def losses(self) -> Floats:
        """The loss of each mass."""
        return self.origin + self.spacing * np.arange(len(self.masses))


def dominating_measure(cells: LossCells) -> GridMeasure:
    """Connect the dots (Doroshenko et al. 2022): each cell spread to its two edges, keeping its P- and Q-mass."""
    lower, upper = _spread(cells)
    masses = np.zeros(len(cells.edges))
    masses[:-1] += lower
    masses[1:] += upper + cells.p_error[1:-1]
    masses[0] += cells.p[0] + cells.p_error[0]
    return GridMeasure(
        origin=float(cells.edges[0]),
        spacing=_spacing(cells),
        masses=masses,
        infinite=float(cells.p[-1] + cells.p_error[-1]),
        shift=cells.loss_error,
    )


def dominated_measure(cells: LossCells, bottom: int, top: int) -> GridMeasure:
    """Cells merged by threes, each triple put on its two inner edges.

    Merging outputs is post-processing. A triple's merged loss is then spread to the two inner edges, which the
    triple's own spread covers (checked for each one); where it does not, the merged loss is rounded down.

    Args:
        cells: The cells, n + 2 of them.
        bottom: How many of the first cells to merge into one.
        top: How many of the last cells to merge into one; the rest must be a multiple of three.
    """
    masses = np.zeros(len(cells.edges))
    last = len(cells.p) - top
    for group in (slice(0, bottom), slice(last, None)):
        _round_down(
            cells,
            masses,
            np.array([cells.p[group].sum()]),
            np.array([cells.q[group].sum()]),
            np.array([cells.p_error[group].sum()]),
            np.array([cells.q_error[group].sum()]),
        )
    _triples(cells, masses, slice(bottom, last))
    return GridMeasure(
        origin=float(cells.edges[0]),
        spacing=_spacing(cells),
        masses=masses,
        infinite=0.0,
        shift=-cells.loss_error - SLACK * _spacing(cells),
    )


def _triples(cells: LossCells, masses: Floats, inside: slice) -> None:
    p, q = (values[inside].reshape(-1, 3) for values in (cells.p, cells.q))
    p_error, q_error = (values[inside].reshape(-1, 3).sum(axis=1) for values in (cells.p_error, cells.q_error))
    first = inside.start + 3 * np.arange(len(p))
    # In units where the ratio z = e^{−loss} is 1 at the lower inner edge and `next_z` at the upper one.
    scaled = q * _ratio(cells.edges[first])[:, None]
    next_z = np.exp(-_spacing(cells))
    total = p.sum(axis=1)
    error = p_error + q_error * _ratio(cells.edges[first]) + total * cells.loss_error
    upper = (total - scaled.sum(axis=1) - error) / (1 - next_z)
    # The triple's own E(κ − z)₊ at both inner edges, and its slopes, bound it from below in between.
    at_upper = np.maximum(next_z * p[:, 2] - scaled[:, 2] - error, 0)
    at_lower = p[:, 1] + p[:, 2] - scaled[:, 1] - scaled[:, 2] - error
    slope_upper, slope_lower = p[:, 2], p[:, 1] + p[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        meet = (at_lower - slope_lower * (1 - next_z) - at_upper) / (slope_upper - slope_lower)
        meet = np.clip(meet, 0, 1 - next_z)
        envelope = np.maximum(at_upper + slope_upper * meet, at_lower - slope_lower * (1 - next_z - meet))
        good = (upper * meet <= envelope) | (upper <= slope_upper)
    good &= (upper >= 0) & (upper <= total - p_error) & (scaled.min(axis=1) > 0) & (q.min(axis=1) > 1e-290)
    np.add.at(masses, first[good], (total - p_error - upper)[good])
    np.add.at(masses, first[good] + 1, upper[good])
    bad = ~good
    _round_down(cells, masses, total[bad], q.sum(axis=1)[bad], p_error[bad], q_error[bad])


def _round_down(cells: LossCells, masses: Floats, p: Floats, q: Floats, p_error: Floats, q_error: Floats) -> None:
    """Put each merged (p, q) on the grid point at or below its loss; below the grid it is dropped."""
    low = np.maximum(p - p_error, 0)
    with np.errstate(divide="ignore"):
        loss = np.log(low) - np.log(q + q_error)
    loss = np.where(low > 0, loss, -np.inf)
    place = np.floor((loss - cells.edges[0]) / _spacing(cells) + SLACK)
    place = np.minimum(place, len(masses) - 1)
    kept = place >= 0
    np.add.at(masses, place[kept].astype(int), low[kept])


def _spread(cells: LossCells) -> tuple[Floats, Floats]:
    """Mass at the lower and at the upper edge of each inner cell; what rounding leaves open goes up."""
    p, q = cells.p[1:-1], cells.q[1:-1]
    scale = _ratio(cells.edges[:-1])
    error = cells.p_error[1:-1] + scale * cells.q_error[1:-1] + 2 * p * cells.loss_error
    upper = np.clip((p - scale * q + error) / -np.expm1(-_spacing(cells)), 0, p)
    upper = np.where(q > 1e-290, upper, p)
    return np.asarray(p - upper), upper


def _ratio(losses: Floats) -> Floats:
    return np.exp(np.minimum(losses, 700.0))


def _spacing(cells: LossCells) -> float:
    return float(cells.edges[1] - cells.edges[0])
