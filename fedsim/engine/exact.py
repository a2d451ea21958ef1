"""Sums that do not depend on order: clipped updates on a public fixed-point grid, added as integers.

Floating-point addition is not associative, so a float sum depends on how units were spread over workers, on which
reply came first, and on which worker failed. Integers add the same in any order.
"""

import math

import numpy as np

FLOAT64_BITS = 53
"""Integers up to 2^53 are exact in float64, so a sum below it turns back into float64 without rounding."""

UNCLIPPED = 1e-3
"""Relative excess over the norm bound beyond which an update was plainly not clipped (float32 clipping: ~1e-6)."""


def resolution_for(norm_bound: float, max_units: int) -> float:
    """The finest step of the fixed-point grid on which so many clipped updates can be summed exactly.

    Args:
        norm_bound: Largest norm of one unit's update, positive.
        max_units: Most units that can ever be in one sum. Use the number of units in the population: a Poisson
            cohort can be all of it.

    Returns:
        A power of two r with norm_bound / r × max_units ≤ 2^53. It depends on public values alone. Truncation takes
        less than r from each coordinate of each update: below max_units × 2^-52 of the norm bound.
    """
    if not (norm_bound > 0 and math.isfinite(norm_bound)):
        raise ValueError(f"norm_bound is {norm_bound}; it must be positive and finite")
    if not 1 <= max_units < 2**FLOAT64_BITS:
        raise ValueError(f"max_units is {max_units}; it must be at least 1 and below 2^{FLOAT64_BITS}")
    _, exponent = math.frexp(norm_bound)  # norm_bound ≤ 2^exponent
    return math.ldexp(1.0, exponent + (max_units - 1).bit_length() - FLOAT64_BITS)


def quantise(update: np.ndarray, norm_bound: float, resolution: float) -> np.ndarray:
    """A clipped update as whole steps of the grid, rounded toward zero.

    ‖result × resolution‖₂ ≤ norm_bound holds exactly, not up to rounding: an update that float32 clipping left a
    little too long is first shortened, with every rounding error of the norm counted against it, and truncation
    never moves a coordinate away from zero (so that it raises no other norm either).

    Args:
        update: float32 or float64 [P], clipped to norm_bound.
        norm_bound: The bound, positive.
        resolution: `resolution_for(norm_bound, …)`, or any power of two.

    Returns:
        int64 [P].

    Raises:
        ValueError: The update is not finite, or longer than float32 clipping could have left it.
    """
    values = update.astype(np.float64)
    # Pairwise summation of P squares is off by less than (log2 P + 3) × 2^-52; P × 2^-53 + 8 × 2^-53 covers any order.
    slack = (len(values) + 16) * 2.0**-53
    longest = math.sqrt(float(np.square(values).sum())) * (1 + slack)
    if not longest <= norm_bound * (1 + slack) * (1 + UNCLIPPED):
        raise ValueError(f"an update of norm {longest:.6g} is not clipped to {norm_bound:.6g}")
    if longest > norm_bound:
        # Two roundings follow, of the quotient and of each product; 2^-50 is more than both.
        values *= norm_bound / longest * (1 - 2.0**-50)
    # Division by a power of two is exact (results are far from float64's smallest), and so is truncation.
    values /= resolution
    return np.trunc(values, out=values).astype(np.int64)


def dequantise(total: np.ndarray, resolution: float) -> np.ndarray:
    """The sum in the updates' own unit: int64 [P] to float64 [P], without rounding while |total| ≤ 2^53."""
    return total.astype(np.float64) * resolution
