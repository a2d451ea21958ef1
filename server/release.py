"""The release: sum, add noise, then divide by a public constant."""

import numpy as np

from fedsim.plan import Plan
from fedsim.randomness import stream

CHUNK = 1 << 20
"""Coordinates whose noise is drawn at once: bounds the extra memory to a few megabytes."""


def noised_mean(total: np.ndarray, plan: Plan, noise_seed: int | bytes, round: int) -> np.ndarray:
    """(total + N(0, σ²C²I)) / normaliser, in place.

    The noise of one round is drawn from its own keyed stream and never used for another sum. Divided by the
    expected, never the realised, number of units: the latter would leak who took part.

    Args:
        total: The clipped sum, float32 or (from exact sums) float64 [P]; overwritten.
        plan: Gives σC and the normaliser.
        noise_seed: Seed or secret key of the noise.
        round: The round, from 0.

    Returns:
        total, now the released mean.
    """
    generator = stream(noise_seed, "noise", round)
    if plan.noise_std > 0:
        for start in range(0, len(total), CHUNK):
            part = total[start : start + CHUNK]
            part += total.dtype.type(plan.noise_std) * generator.standard_normal(len(part), dtype=total.dtype)
    total /= total.dtype.type(plan.normaliser)
    return total
