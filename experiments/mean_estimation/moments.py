"""Moments of clipped Gaussian vectors, exactly: what clipping does to mean estimation.

A vector y = v + τ·g with g standard normal in d dimensions is clipped to norm C. Two facts make every moment that is
needed here a one-dimensional integral over the norm of y:

* ‖y‖²/τ² is noncentral χ² with d degrees of freedom and noncentrality ‖v‖²/τ²;
* E[h(‖y‖²)·y] = v·E[h(τ²X)] with X noncentral χ² with d + 2 degrees of freedom and the same noncentrality (the
  identity behind James–Stein estimation: M. E. Bock, 1975, Theorem A).
"""

from collections.abc import Callable

import numpy as np
import scipy
from numpy.polynomial.legendre import leggauss

NODES, WEIGHTS = leggauss(48)
REACH = 9.0
"""Standard deviations around the typical norm beyond which no mass is integrated (below 1e-17)."""


def shrinkage(center_norm: np.ndarray, spread: float, clip_norm: float, dimension: int) -> np.ndarray:
    """κ with E[clip(v + τg)] = κ·v.

    Args:
        center_norm: ‖v‖, shape [K].
        spread: τ, standard deviation of one coordinate; 0 for a fixed vector.
        clip_norm: C.
        dimension: d.

    Returns:
        κ in (0, 1], shape [K].
    """
    center_norm = np.asarray(center_norm, dtype=float)
    if spread == 0:
        kappa: np.ndarray = np.minimum(1.0, clip_norm / np.maximum(center_norm, 1e-300))
        return kappa
    return _expectation(lambda norm: np.minimum(1.0, clip_norm / norm), center_norm, spread, clip_norm, dimension + 2)


def clipped_square(center_norm: float, spread: float, clip_norm: float, dimension: int) -> float:
    """E‖clip(v + τg)‖²."""
    if spread == 0:
        return min(center_norm, clip_norm) ** 2
    values = _expectation(
        lambda norm: np.minimum(norm, clip_norm) ** 2, np.array([center_norm]), spread, clip_norm, dimension
    )
    return float(values[0])


def clipped_product(
    center_norm: float, common_spread: float, own_spread: float, clip_norm: float, dimension: int
) -> float:
    """E⟨clip(y), clip(y′)⟩ for two vectors that share a Gaussian part.

    y = v + common_spread·g + own_spread·g₁ and y′ = v + common_spread·g + own_spread·g₂. Given the common part they
    are independent, so the product of their clipped means is averaged over it.
    """
    if own_spread == 0:
        return clipped_square(center_norm, common_spread, clip_norm, dimension)
    if common_spread == 0:
        kappa = shrinkage(np.array([center_norm]), own_spread, clip_norm, dimension)[0]
        return float((kappa * center_norm) ** 2)
    norms, weights = _norm_nodes(center_norm, common_spread, clip_norm, dimension)
    kappa = shrinkage(norms, own_spread, clip_norm, dimension)
    return float(np.sum(weights * (kappa * norms) ** 2))


def _expectation(
    function: Callable[[np.ndarray], np.ndarray],
    center_norm: np.ndarray,
    spread: float,
    clip_norm: float,
    degrees: int,
) -> np.ndarray:
    """E[function(τ√X)] for X noncentral χ² with these degrees of freedom and noncentrality (‖v‖/τ)²."""
    norms, weights = _norm_nodes(center_norm[:, None], spread, clip_norm, degrees)
    expected: np.ndarray = np.sum(weights * function(norms), axis=-1)
    return expected


def _norm_nodes(
    center_norm: float | np.ndarray, spread: float, clip_norm: float, degrees: int
) -> tuple[np.ndarray, np.ndarray]:
    """Quadrature nodes and probabilities for the norm; the clip norm, where integrands have a kink, ends a panel."""
    center = np.asarray(center_norm, dtype=float)
    typical = np.sqrt(center**2 + spread**2 * degrees)
    low = np.maximum(typical - REACH * spread, 1e-9 * typical)
    high = typical + REACH * spread
    middle = np.clip(clip_norm, low, high)
    halves = [(low, middle), (middle, high)]
    norms = np.concatenate([(a + b) / 2 + (b - a) / 2 * NODES for a, b in halves], axis=-1)
    widths = np.concatenate([(b - a) / 2 * WEIGHTS for a, b in halves], axis=-1)
    return norms, widths * _norm_density(norms, center, spread, degrees)


def _norm_density(norm: np.ndarray, center_norm: np.ndarray, spread: float, degrees: int) -> np.ndarray:
    """Density of τ√X at norm (Rice's for two degrees of freedom)."""
    r, v = norm / spread, center_norm / spread
    order = degrees / 2 - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        around = np.exp(-((r - v) ** 2) / 2 + (order + 1) * np.log(r) - order * np.log(v)) * scipy.special.ive(
            order, r * v
        )
    # As ‖v‖ → 0 the Bessel function underflows; its leading term is what remains.
    central = np.exp(
        (2 * order + 1) * np.log(r) - (r**2 + v**2) / 2 - order * np.log(2) - scipy.special.gammaln(order + 1)
    )
    density: np.ndarray = np.where(r * v > 1e-6, np.nan_to_num(around), central) / spread
    return density
