"""Coefficients of banded noise: the best for a workload, and the sensitivity that they have.

With C the lower-triangular Toeplitz matrix whose first column is c_0 = 1, c_1, …, c_{b−1}, 0, …, who releases
sums + z·C⁻¹ξ releases C·sums + z·ξ, multiplied by C⁻¹ afterwards: the Gaussian mechanism on C·sums, whose sensitivity
is that of the columns of C which one user can touch (Denisov et al. 2022, arXiv 2202.08312, also where later updates
depend on earlier releases). Two columns b or more apart share no row.

All coefficients that leave this file are multiples of 2⁻²⁰, so that integer arithmetic can apply them exactly.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import scipy

from fedsim.errors import InvalidInput
from fedsim.privacy.mechanisms.banded.workload import Workload
from fedsim.validation import require_at_least

GRID = 2.0**-20
"""Step of the grid that coefficients lie on."""
Objective = Callable[[np.ndarray], tuple[float, np.ndarray]]

HOPELESS = 1e4
"""Stands for the logarithm of an error that float64 cannot hold; all that it can hold are far below."""


def square_root_coefficients(bands: int) -> np.ndarray:
    """The first coefficients of (1 − z)^(−1/2): c_k = c_{k−1}·(2k − 1)/(2k).

    Without a band limit they are the square root of the matrix of prefix sums; cut off after the band they are the
    banded square root of Kalinin and Lampert 2024 (arXiv 2405.13763).

    Returns:
        float64 [bands], positive and falling from 1; not on the grid.
    """
    require_at_least("bands", bands, 1)
    steps = np.arange(1, bands)
    return np.concatenate([[1.0], np.cumprod((2 * steps - 1) / (2 * steps))])


def optimal_coefficients(bands: int, workload: Workload, *, monotone: bool = False) -> tuple[float, ...]:
    """The coefficients c, c_0 = 1, with the least `workload.error(c)`, which carries the factor ‖c‖₂.

    ‖c‖₂ is the sensitivity of a user who takes part once, or several times at rounds at least b apart, counted each by
    itself. The optimum is local, found from the square root's coefficients, and the same on every call. With a second
    moment (Adam) it is the best of the optima of `workload.fits`.

    Args:
        bands: b, from 1 to the number of rounds.
        workload: What the optimizer makes of the releases.
        monotone: Only 1 = c_0 ≥ c_1 ≥ … ≥ c_{b−1} ≥ 0, as `participation_sensitivity` needs beyond the band. The noise
            of a single round is bounded then, however many rounds there are (Eneström–Kakeya: 1/c(z) has no pole
            inside the unit circle).

    Returns:
        b multiples of 2⁻²⁰, never worse than the square root's coefficients on the same grid.

    Raises:
        InvalidInput: For bands below 1 or above the rounds.
    """
    if not 1 <= bands <= workload.rounds:
        raise InvalidInput("bands", bands, f"a whole number from 1 to the {workload.rounds} rounds")
    start = square_root_coefficients(bands)
    candidates = [on_grid(start)]
    for fit in workload.fits:
        found = _least(start, fit)
        if monotone and not _falls(found):
            found = _least_monotone(found, fit)
        candidates.append(on_grid(found))
    return min(candidates, key=workload.error)


def on_grid(coefficients: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    """Coefficients rounded to the nearest multiples of 2⁻²⁰; order and signs are kept."""
    # Adding 0 makes −0 of small negative values 0.
    return tuple(float(value) + 0.0 for value in np.rint(np.asarray(coefficients) / GRID) * GRID)


def norm_above(coefficients: Sequence[float] | np.ndarray) -> float:
    """‖c‖₂ rounded up: the least float64 not below it. Noise of this many clip norms is enough."""
    return _root_above(sum((Fraction(float(value)) ** 2 for value in coefficients), start=Fraction(0)))


def participation_sensitivity(
    coefficients: Sequence[float] | np.ndarray, rounds: int, separation: int, participations: int
) -> float:
    """The most that one user can move C·sums, over all patterns of participation without sampling.

    The user takes part in at most k rounds, any two at least `separation` apart, with contributions g_i of norm at
    most 1 chosen freely (they may depend on earlier releases). For c non-negative and non-increasing the largest
    ‖Σ_i C[:, s_i] g_iᵀ‖_F is ‖Σ_{i<k} C[:, i·separation]‖₂ (Choquette-Choo et al. 2023, arXiv 2306.08153; Kalinin and
    Lampert 2024, arXiv 2405.13763, Theorem 2). Why: entries of C are at least 0, so inner products of columns are too,
    and equal directions are worst. For s < t the inner product Σ_{m < T−t} c_{m+t−s}·c_m falls when t grows and when
    t − s grows; the i-th participation comes at round i·separation or later, and any two lie at least as far apart as
    there; so each inner product, and each norm, is largest for the earliest and densest pattern. More participations
    only add non-negative terms.

    Up to a band as long as the separation no two columns share a row, norms alone add up, and c may have any signs.

    Args:
        coefficients: c; shorter than `rounds` means zeros after it, longer is cut off.
        rounds: T: columns end with it.
        separation: Least distance in rounds between two participations of one user, at least 1.
        participations: k, the most participations of one user; those that do not fit into T rounds are not counted.

    Returns:
        The sensitivity in clip norms, rounded up to the next float64.

    Raises:
        InvalidInput: For numbers below 1, or coefficients that the formula does not hold for.
    """
    for name, value in (("rounds", rounds), ("separation", separation), ("participations", participations)):
        require_at_least(name, value, 1)
    c = np.asarray(coefficients, dtype=np.float64)[:rounds]
    if not np.isfinite(c).all():
        raise InvalidInput("coefficients", coefficients, "finite numbers")
    if len(c) > separation and not _falls(c):
        allowed = f"non-negative and non-increasing where there are more of them than the separation, {separation}"
        raise InvalidInput("coefficients", coefficients, allowed, "optimal_coefficients(monotone=True) gives such.")
    # Every float64 is a whole number of a power of two; over the smallest of these all sums are exact integers.
    ratios = [float(value).as_integer_ratio() for value in c]
    unit = max(denominator for _, denominator in ratios)
    whole = [numerator * (unit // denominator) for numerator, denominator in ratios]
    column = [0] * rounds
    for first in list(range(0, rounds, separation))[:participations]:
        for row, value in enumerate(whole[: rounds - first], start=first):
            column[row] += value
    return _root_above(Fraction(sum(value * value for value in column), unit * unit))


def _least(start: np.ndarray, workload: Workload) -> np.ndarray:
    """A local minimum of log ‖c‖²·E(c), E the workload's mean square, in c_1, c_2, …"""

    def objective(free: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _log_square(np.concatenate([start[:1], free]), workload)
        return value, gradient[1:]

    return np.concatenate([start[:1], _minimum(objective, start[1:], None)])


def _least_monotone(start: np.ndarray, workload: Workload) -> np.ndarray:
    """The same among falling coefficients, in the steps c_k − c_{k+1} ≥ 0; the objective does not know their scale."""

    def objective(steps: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _log_square(np.cumsum(steps[::-1])[::-1], workload)
        return value, np.cumsum(gradient)

    near = np.minimum.accumulate(np.maximum(start, 0.0))
    steps = _minimum(objective, near - np.append(near[1:], 0.0), [(0.0, None)] * len(near))
    falling: np.ndarray = np.cumsum(steps[::-1])[::-1] / steps.sum()
    return falling


def _falls(c: np.ndarray) -> bool:
    return bool((c >= 0).all() and (np.diff(c) <= 0).all())


def _log_square(c: np.ndarray, workload: Workload) -> tuple[float, np.ndarray]:
    """log ‖c‖²·E(c) and its gradient: in logarithms, steps of the search mean the same at any scale."""
    if c[0] == 0:
        return HOPELESS, np.zeros(len(c))
    square, gradient = workload.mean_square(c)
    norm = float(c @ c)
    if not (math.isfinite(square) and np.isfinite(gradient).all()):
        return HOPELESS, np.zeros(len(c))
    return math.log(norm * square), 2 * c / norm + gradient / square


def _minimum(objective: Objective, start: np.ndarray, bounds: list[tuple[float, None]] | None) -> np.ndarray:
    if not len(start):
        return start
    options = {"maxiter": 1000, "maxcor": 20, "ftol": 1e-10, "gtol": 1e-8}
    found = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return np.asarray(found.x, dtype=np.float64)


def _root_above(square: Fraction) -> float:
    """The least float64 whose square is not below the exact value."""
    # Two correct roundings, the first halved by the root, put this less than one step from the exact root.
    root = math.sqrt(square)
    return root if Fraction(root) ** 2 >= square else math.nextafter(root, math.inf)
