"""Randomised-scale Laplace noise on one number: exact δ(ε), Rényi divergence, sampler and density.

After LMO-DP (Yang et al. 2024): X given S is Laplace with scale 1/S, and S follows a law of `inverse_scale`. With M
the moment generating function of S,

    Pr[X > x] = M(−x)/2 for x ≥ 0,        density f(x) = M′(−|x|)/2,

so everything below follows from M. The guarantee is for one number of sensitivity 1. It does not carry over to a
vector clipped in L2: see docs/mechanisms.md. For vectors clipped in L1 see `vector_laplace`.
"""

import math
from collections.abc import Callable

import numpy as np

from fedsim.privacy.mechanisms.laplace.inverse_scale import Law, log_mgf, log_mgf_slope, sample_inverse_scales

ORDERS = np.concatenate([1 + np.geomspace(1e-3, 10, 200), np.arange(12, 257)])
"""Rényi orders over which rdp_epsilon minimises."""
FAR = 28.0
"""log(1 + |x|) beyond which a loss that still exceeds ε is taken to exceed it for ever."""


def sample_noise(
    law: Law, size: int | tuple[int, ...], generator: np.random.Generator, *, shared: bool = False
) -> np.ndarray:
    """Noise, float64 of the given size.

    Args:
        law: The law of the inverse scale.
        size: Shape; its last axis runs over coordinates.
        generator: Source of randomness.
        shared: One inverse scale for all coordinates of a vector (what `vector_laplace` accounts), instead of one for
            each coordinate (the published form).
    """
    shape = (size,) if isinstance(size, int) else tuple(size)
    scales = sample_inverse_scales(law, (*shape[:-1], 1) if shared else shape, generator)
    noise: np.ndarray = generator.laplace(size=shape) / scales
    return noise


def log_density(law: Law, x: np.ndarray | float) -> np.ndarray:
    """log f(x) of the noise on one number."""
    return log_mgf_slope(law, -np.abs(x)) - math.log(2)


def privacy_loss(law: Law, x: np.ndarray, shift: np.ndarray | float) -> np.ndarray:
    """log f(x)/f(x − shift) of each coordinate; a vector of independent coordinates has the sum as its loss."""
    loss: np.ndarray = log_density(law, x) - log_density(law, x - shift)
    return loss


def pure_epsilon(law: Law) -> float:
    """The ε of pure differential privacy, E[S]/E[S e^{−S}] in logarithm; the loss nowhere exceeds it."""
    return float(log_mgf_slope(law, 0.0) - log_mgf_slope(law, -1.0))


def scalar_delta(law: Law, epsilon: float) -> float:
    """Exact δ(ε) of one release of a number of sensitivity 1, for ε ≥ 0, up to rounding.

    The loss log f(x)/f(x−1) rises on x < 0 and falls on [0, 1], because log M is convex; so it exceeds ε on one
    interval, whose probabilities M gives. Shifts below 1 are no worse: moving the shift up moves the interval's mass
    under the shifted law down, f being symmetric and unimodal.
    """
    if epsilon >= pure_epsilon(law):
        return 0.0
    right = _last_above(lambda x: _loss(law, x), epsilon, 1.0)
    reach = _last_above(lambda y: _loss(law, -np.expm1(y)), epsilon, FAR)
    left = -math.inf if reach >= FAR else -math.expm1(reach)
    inside = _survival(law, left) - _survival(law, right)
    shifted = _survival(law, left - 1) - _survival(law, right - 1)
    return max(0.0, float(inside - math.exp(epsilon) * shifted))


def renyi_divergence(law: Law, orders: np.ndarray | float) -> np.ndarray:
    """Rényi divergence bound of order α > 1 for one release; +inf at and past a pole of M.

    R(α) = log{[α M(α−1) + (α−1) M(−α)]/(2α−1)}/(α−1): that of Laplace noise whose inverse scale is revealed, hence a
    bound for one number, and for a vector clipped to 1 in L1 whether its coordinates share S or draw it independently
    (log of the braces is convex in the shift and 0 at 0, so it is largest where one coordinate moves by 1).
    """
    alpha = np.asarray(orders, dtype=np.float64)
    if (alpha <= 1).any():
        raise ValueError("orders must be above 1")
    with np.errstate(invalid="ignore"):
        total = np.logaddexp(np.log(alpha) + log_mgf(law, alpha - 1), np.log(alpha - 1) + log_mgf(law, -alpha))
    return np.where(np.isfinite(total), (total - np.log(2 * alpha - 1)) / (alpha - 1), np.inf)


def rdp_epsilon(law: Law, delta: float, releases: int = 1, orders: np.ndarray = ORDERS) -> float:
    """Upper bound on ε at δ of several releases, by Rényi composition; +inf where no order is finite.

    Conversion: Canonne, Kamath and Steinke 2020, Proposition 12.
    """
    alpha = np.asarray(orders, dtype=np.float64)
    bounds = (
        releases * renyi_divergence(law, alpha)
        + np.log1p(-1 / alpha)
        - (math.log(delta) + np.log(alpha)) / (alpha - 1)
    )
    return max(0.0, float(bounds.min()))


def rdp_delta(law: Law, epsilon: float, releases: int = 1, orders: np.ndarray = ORDERS) -> float:
    """Upper bound on δ at ε of several releases, by the same conversion; 1 where no order is finite."""
    alpha = np.asarray(orders, dtype=np.float64)
    exponent = (alpha - 1) * (releases * renyi_divergence(law, alpha) - epsilon)
    bounds = exponent + (alpha - 1) * np.log1p(-1 / alpha) - np.log(alpha)
    return float(min(1.0, np.exp(min(0.0, bounds.min()))))


def _loss(law: Law, x: np.ndarray) -> np.ndarray:
    loss: np.ndarray = log_mgf_slope(law, -np.abs(x)) - log_mgf_slope(law, -np.abs(x - 1))
    return loss


def _last_above(loss: Callable[[np.ndarray], np.ndarray], epsilon: float, end: float) -> float:
    """The last point of [0, end] at which a falling loss is above ε, to a relative 1e-9: δ(ε) is flat there, so its
    own error is the square of that."""
    start = 0.0
    for _ in range(5):
        points = np.linspace(start, end, 65)
        last = int(np.count_nonzero(loss(points) > epsilon)) - 1
        if last == 64:
            return end
        start, end = float(points[max(last, 0)]), float(points[max(last, 0) + 1])
    return start


def _survival(law: Law, x: float) -> float:
    """Pr[X > x]."""
    if x == -math.inf:
        return 1.0
    tail = 0.5 * math.exp(float(log_mgf(law, -abs(x))))
    return tail if x >= 0 else 1 - tail
