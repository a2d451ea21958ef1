"""Plain Gaussians compose to one Gaussian, whose privacy curve is closed."""

from collections.abc import Sequence

import numpy as np
import scipy

from fedsim.privacy.bounds import Bounds

SEARCH = 1e-15
"""How far, absolutely, the search may end from a root."""
MARGIN = 1e-10
"""Relative distance of the bounds from the root that the search returns; its own error is far smaller."""


def gaussian_epsilon(shift: float, delta: float) -> Bounds:
    """ε at delta for N(shift, 1) against N(0, 1), between bounds."""
    if shift == 0 or log_delta(shift, 0.0)[0] <= np.log(delta):
        return Bounds(lower=0.0, upper=0.0)
    most = shift * shift / 2 + shift * (np.sqrt(-2 * np.log(delta)) + 1)
    roots = [
        scipy.optimize.brentq(
            lambda epsilon, end=end: log_delta(shift, epsilon)[end] - np.log(delta), 0.0, most, xtol=SEARCH
        )
        if log_delta(shift, 0.0)[end] > np.log(delta)
        else 0.0
        for end in (0, 1)
    ]
    return Bounds(lower=max(min(roots) * (1 - MARGIN) - 2 * SEARCH, 0.0), upper=max(roots) * (1 + MARGIN) + 2 * SEARCH)


def gaussian_delta(shift: float, epsilon: float) -> Bounds:
    """δ at epsilon for N(shift, 1) against N(0, 1), between bounds."""
    if shift == 0:
        return Bounds(lower=0.0, upper=0.0)
    upper, lower = np.exp(log_delta(shift, epsilon))
    return Bounds(lower=float(lower) * (1 - MARGIN), upper=min(float(upper) * (1 + MARGIN), 1.0))


def composed_shift(shifts: Sequence[tuple[float, int]]) -> float:
    """The shift of the composition of Gaussians, each taken as often as its count says."""
    return float(np.sqrt(sum(count * shift * shift for shift, count in shifts)))


def log_delta(shift: float, epsilon: float) -> tuple[float, float]:
    """log of δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) (Balle and Wang 2018), raised and lowered by rounding.

    The second term is taken as e^{−t²/2} erfcx(u/√2)/2 with t = ε/μ − μ/2 and u = ε/μ + μ/2, which holds no large ε.
    """
    t, u = epsilon / shift - shift / 2, epsilon / shift + shift / 2
    first = float(scipy.special.log_ndtr(-t))
    second = -t * t / 2 + float(np.log(scipy.special.erfcx(u / np.sqrt(2)))) - np.log(2)
    # t is off by a few roundings of u, and so are the terms by their slopes in t.
    doubt = 8 * np.finfo(float).eps * (1 + abs(first) + (1 + max(t, 0.0)) * u)
    other = 8 * np.finfo(float).eps * (1 + abs(second) + (1 + abs(t)) * u)
    with np.errstate(divide="ignore"):
        upper = first + doubt + np.log(-np.expm1(min(second - other - first - doubt, 0.0)))
        lower = first - doubt + np.log(-np.expm1(min(second + other - first + doubt, 0.0)))
    return float(upper), float(lower)
