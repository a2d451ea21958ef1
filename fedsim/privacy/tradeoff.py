"""Curves of a guarantee: δ against ε, and the trade-off of an attacker's errors (f-DP)."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedsim.privacy.accountant import delta_bounds, delta_bounds_at, epsilon_bounds
from fedsim.privacy.events import Adjacency, Event
from fedsim.privacy.loss_cells import Floats
from fedsim.validation import require_between

ROUNDING = 1e-15
"""Of the arithmetic here, on the safe side."""
PLACES = ((0.98, 48), (0.01, 256), (0.0, 128))
"""Parts of the largest δ that the curve passes (at last the least δ), and how many points lead up to each."""


@dataclass(frozen=True, kw_only=True)
class PrivacyCurve:
    """Certified points of the boundary between what is and what is not guaranteed.

    Attributes:
        epsilons: ε, rising from 0, float64 [points].
        upper: Upper bounds on δ at each ε, float64 [points].
        lower: Lower bounds, float64 [points].
    """

    epsilons: Floats
    upper: Floats
    lower: Floats

    def tradeoff(self, type_one: Floats) -> Floats:
        """Least type II error of any test between the two data sets at each type I error.

        f(α) = max over the points of max(0, 1 − δ − e^ε α, e^{−ε}(1 − δ − α)) (Dong, Roth and Su 2022,
        Proposition 2.5). Each point says that every test's type I error α and type II error β obey
        1 − β ≤ δ + e^ε α, and the same with the two data sets exchanged, since δ bounds both directions; so the bound
        holds for every set of points, and upper bounds on δ only lower it. Every attack's errors lie on or above it.

        Args:
            type_one: Type I errors α in [0, 1], float64 [n].

        Returns:
            float64 [n], a certified lower bound on the trade-off function.
        """
        left = 1 - self.upper[:, None]
        with np.errstate(over="ignore", invalid="ignore"):
            growth = np.exp(self.epsilons)[:, None]
            steep = np.where(type_one > 0, left - growth * type_one, left)  # also where e^ε is no float
        flat = (left - type_one) / growth
        best: Floats = np.maximum(steep, flat).max(axis=0)
        return np.maximum(best - ROUNDING, 0.0)

    def least_type_one(self, power: float) -> float:
        """Least type I error of any test of this power: `tradeoff` read the other way round.

        The two data sets may be exchanged, so it is f(1 − power); this says it without taking a small power from 1.

        Args:
            power: One less the type II error, in [0, 1].
        """
        flat, steep = (power - self.upper) * self._decay, 1 - self.upper - self._growth * (1 - power)
        return float(max(0.0, (1 - ROUNDING) * flat.max(), steep.max() - ROUNDING))

    @cached_property
    def _growth(self) -> Floats:
        """e^ε at each point, where that is a float: 1 less any float below 1 makes as much of e^700 as of more."""
        growth: Floats = np.exp(np.minimum(self.epsilons, 700.0))
        return growth

    @cached_property
    def _decay(self) -> Floats:
        """e^{−ε} at each point."""
        decay: Floats = np.exp(-self.epsilons)
        return decay


def privacy_curve(
    event: Event, *, adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER, least_delta: float = 1e-12
) -> PrivacyCurve:
    """δ bounds of an event at some hundred ε, from 0 to where δ is least_delta.

    Args:
        event: What is released.
        adjacency: Which data sets count as neighbours.
        least_delta: How far down the curve goes.

    Raises:
        InvalidInput: For a least_delta outside (0, 1).
    """
    require_between("least_delta", least_delta, 0, 1)
    epsilons = np.zeros(1)
    largest = delta_bounds(event, 0.0, adjacency=adjacency, tolerance=0.05).upper
    for part, points in PLACES:
        delta = max(part * largest, least_delta)
        end = epsilon_bounds(event, delta, adjacency=adjacency, tolerance=0.05).upper
        if epsilons[-1] < end < math.inf:
            epsilons = np.append(epsilons, np.linspace(epsilons[-1], end, points + 1)[1:])
    epsilons = np.unique(epsilons)
    lower, upper = delta_bounds_at(event, epsilons, adjacency=adjacency, least_delta=least_delta)
    return PrivacyCurve(epsilons=epsilons, upper=upper, lower=lower)
