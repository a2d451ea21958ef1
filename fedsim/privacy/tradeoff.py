"""Curves of a guarantee: ε against δ, and the trade-off of an attacker's errors (f-DP)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.bounds import Bounds
from fedsim.privacy.events import Adjacency, Event

Floats = NDArray[np.float64]
LARGE = (0.02, 0.035, 0.05, 0.075, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
DELTAS = np.array([*np.geomspace(1e-12, 1e-3, 10), 3e-3, 1e-2, *LARGE])


@dataclass(frozen=True, kw_only=True)
class PrivacyCurve:
    """Certified points of the boundary between what is and what is not guaranteed.

    Attributes:
        deltas: δ, rising, float64 [points].
        upper: Upper bounds on ε at each δ, float64 [points].
        lower: Lower bounds, float64 [points].
    """

    deltas: Floats
    upper: Floats
    lower: Floats

    def tradeoff(self, type_one: Floats) -> Floats:
        """Least type II error of any test between the two data sets at each type I error.

        f(α) = max over the points of max(0, 1 − δ − e^ε α, e^{−ε}(1 − δ − α)) (Dong, Roth and Su 2022,
        Proposition 2.5), from upper bounds on ε: every attack's errors lie on or above it.

        Args:
            type_one: Type I errors α in [0, 1], float64 [n].

        Returns:
            float64 [n], a certified lower bound on the trade-off function.
        """
        left = 1 - self.deltas[:, None]
        growth = np.exp(np.minimum(self.upper, 700.0))[:, None]
        steep = left - growth * type_one
        flat = (left - type_one) / growth
        best: Floats = np.maximum(steep, flat).max(axis=0)
        return np.maximum(best, 0.0)


def privacy_curve(
    event: Event,
    *,
    adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER,
    deltas: Floats | None = None,
    least_epsilon: float = 0.1,
    tolerance: float = 1e-2,
) -> PrivacyCurve:
    """ε bounds of an event at many δ.

    Args:
        event: What is released.
        adjacency: Which data sets count as neighbours.
        deltas: δ in (0, 1); by default 28 values from 1e-12 to 0.9, most of them large.
        least_epsilon: The curve ends with the first ε below this: still smaller ones are slow to bound, and show
            nothing.
        tolerance: Relative distance of the bounds.

    Raises:
        InvalidInput: For a δ outside (0, 1).
    """
    deltas = np.sort(DELTAS if deltas is None else np.asarray(deltas, dtype=np.float64))
    bounds: list[Bounds] = []
    for delta in deltas:
        bounds.append(epsilon_bounds(event, float(delta), adjacency=adjacency, tolerance=tolerance))
        if bounds[-1].upper < least_epsilon:
            break
    return PrivacyCurve(
        deltas=deltas[: len(bounds)],
        upper=np.array([one.upper for one in bounds]),
        lower=np.array([one.lower for one in bounds]),
    )
