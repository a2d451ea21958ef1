"""Sums that do not depend on order: clipped updates on a public fixed-point grid, added as integers.

Floating-point addition is not associative, so a float sum depends on how units were spread over workers, on which
reply came first, and on which worker failed. Integers add the same in any order.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from fedsim.clip import Clip
from fedsim.engine.work import Vector

FLOAT64_BITS = 53
"""Integers up to 2^53 are exact in float64, so a sum below it turns back into float64 without rounding."""

MICRO_BATCH_TOKENS = 1024
"""Tokens of a micro-batch unless the configuration says: an update's last bits depend on it, so that nothing measured
on a device, its free memory least of all, may choose it."""

UNCLIPPED = 1e-3
"""Relative excess over the limit beyond which an update was plainly not clipped (float32 clipping: ~1e-6)."""


def resolution_for(clip: Clip, max_units: int) -> float:
    """The finest step of the fixed-point grid on which so many clipped updates can be summed exactly.

    Args:
        clip: What every update is brought to.
        max_units: Most units that can ever be in one sum. Use the number of units in the population: a Poisson
            cohort can be all of it.

    Returns:
        A power of two r with clip.bound / r × max_units ≤ 2^53. It depends on public values alone. Truncation takes
        less than r from each coordinate of each update: below max_units × 2^-52 of the bound.
    """
    if not 1 <= max_units < 2**FLOAT64_BITS:
        raise ValueError(f"max_units is {max_units}; it must be at least 1 and below 2^{FLOAT64_BITS}")
    _, exponent = math.frexp(clip.bound)  # bound ≤ 2^exponent
    return math.ldexp(1.0, exponent + (max_units - 1).bit_length() - FLOAT64_BITS)


def quantise(update: Vector, clip: Clip, sizes: Mapping[str, int], resolution: float) -> Vector:
    """A clipped update as whole steps of the grid, rounded toward zero.

    The result times resolution is within the clip exactly, not up to rounding, in the clip's own norm and blocks: an
    update that float32 clipping left a little too long is first shortened, with every rounding error of the norm
    counted against it, and truncation never moves a coordinate away from zero.

    Args:
        update: float32 or float64 [P], clipped: an array, or a tensor on any device.
        clip: What it was clipped to.
        sizes: Values of each parameter by name, in the order of the vector.
        resolution: `resolution_for(clip, …)`, or any power of two.

    Returns:
        int64 [P], an array or a tensor on the update's device.

    Raises:
        ValueError: The update is not finite, or reaches farther than float32 clipping could have left it.
    """
    array = isinstance(update, np.ndarray)
    values = update.astype(np.float64) if array else update.double().clone()
    reach = clip.reach(values, sizes) if array else clip.reach_of_sums(_sums(values, clip.order, sizes), sizes)
    shorter = _shortening(reach, clip)
    if shorter < 1:
        values *= shorter
    # Division by a power of two is exact (results are far from float64's smallest), and so is truncation.
    values /= resolution
    return np.trunc(values, out=values).astype(np.int64) if array else values.trunc_().long()


def quantiser(update: Mapping[str, Vector], clip: Clip, resolution: float) -> Callable[[str], Vector]:
    """`quantise`, of one parameter at a time: a function from a parameter's name to its whole steps, the same bits.

    Args:
        update: A clipped update as a tensor for each parameter, in the order of the vector.
        clip, resolution: As for `quantise`.

    Raises:
        ValueError: As `quantise`.
    """
    sizes = {name: int(part.numel()) for name, part in update.items()}
    sums = np.array([float(_sum(part.double().flatten(), clip.order)) for part in update.values()])
    shorter = _shortening(clip.reach_of_sums(sums, sizes), clip)

    def steps(name: str) -> Vector:
        values = update[name].double()
        if shorter < 1:
            values = values * shorter
        return (values / resolution).trunc_().long()

    return steps


def _shortening(reach: float, clip: Clip) -> float:
    """What an update that reaches so far is multiplied by to be within the clip exactly: 1, or a little less."""
    if not reach <= 1 + UNCLIPPED:
        raise ValueError(f"an update that reaches {reach:.6g} of its limit is not {clip.in_words()}")
    # Two roundings follow, of the quotient and of each product; 2^-50 is more than both.
    return 1 / reach * (1 - 2.0**-50) if reach > 1 else 1.0


def _sums(values: Vector, order: int, sizes: Mapping[str, int]) -> np.ndarray:
    """Σ|x|^order of each parameter of a tensor, added up where it is."""
    sums = values.new_empty(len(sizes))
    for place, part in enumerate(values.split(list(sizes.values()))):
        sums[place] = _sum(part, order)
    found: np.ndarray = sums.cpu().numpy()
    return found


def _sum(part: Vector, order: int) -> Vector:
    return part.square().sum() if order == 2 else part.abs().sum()


def dequantise(total: np.ndarray, resolution: float) -> np.ndarray:
    """The sum in the updates' own unit: int64 [P] to float64 [P], without rounding while |total| ≤ 2^53."""
    values: np.ndarray = total.astype(np.float64) * resolution
    return values
