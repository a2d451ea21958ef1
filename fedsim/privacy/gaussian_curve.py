"""Plain Gaussians compose to one Gaussian, whose privacy curve is closed."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr

from fedsim.privacy.bounds import Bounds

MARGIN = 1e-10
"""Relative distance of the bounds from the root that the search returns; its own error is far smaller."""


def gaussian_epsilon(shift: float, delta: float) -> Bounds:
    """ε at delta for N(shift, 1) against N(0, 1), between bounds."""
    if log_delta(shift, 0.0)[0] <= np.log(delta):
        return Bounds(lower=0.0, upper=0.0)
    most = shift * shift / 2 + shift * np.sqrt(-2 * np.log(delta)) + 1e-9
    roots = [
        brentq(lambda epsilon, end=end: log_delta(shift, epsilon)[end] - np.log(delta), 0.0, most, xtol=1e-15)
        for end in (0, 1)
    ]
    return Bounds(lower=min(roots) * (1 - MARGIN), upper=max(roots) * (1 + MARGIN))


def gaussian_delta(shift: float, epsilon: float) -> Bounds:
    """δ at epsilon for N(shift, 1) against N(0, 1), between bounds."""
    upper, lower = np.exp(log_delta(shift, epsilon))
    return Bounds(lower=float(lower) * (1 - MARGIN), upper=min(float(upper) * (1 + MARGIN), 1.0))


def composed_shift(shifts: Sequence[tuple[float, int]]) -> float:
    """The shift of the composition of Gaussians, each taken as often as its count says."""
    return float(np.sqrt(sum(count * shift * shift for shift, count in shifts)))


def log_delta(shift: float, epsilon: float) -> tuple[float, float]:
    """log of δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) (Balle and Wang 2018), raised and lowered by rounding."""
    first = float(log_ndtr(shift / 2 - epsilon / shift))
    second = epsilon + float(log_ndtr(-shift / 2 - epsilon / shift))
    doubt = 8 * np.finfo(float).eps * (1 + abs(first) + abs(epsilon) + abs(second))
    with np.errstate(divide="ignore"):
        upper = first + np.log(-np.expm1(min(second - first, 0.0) - 2 * doubt)) + doubt
        lower = first + np.log(-np.expm1(min(second - first + 2 * doubt, 0.0))) - doubt
    return float(upper), float(lower)
