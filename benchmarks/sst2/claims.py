"""What a number of the table is worth: certified, estimated, or claimed in vain."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import scipy

from benchmarks.laplace_dimension import monte_carlo_delta
from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.edgeworth import epsilon_estimate
from fedsim.privacy.events import Composed, Event, PoissonSubsampledGaussian, Repeated
from fedsim.privacy.mechanisms.laplace.inverse_scale import Law, rescaled
from fedsim.privacy.mechanisms.laplace.scalar import pure_epsilon

GUARANTEE, ESTIMATE, NONE = "guarantee", "estimate", "not a guarantee"
ORDER = 1
"""Of the Edgeworth series, as EW-Tune takes it."""
LEAST_NOISE, MOST_NOISE = 0.2, 50.0
SHARP: Law = (("uniform", 0.994, 0.24, 0.36), ("uniform", 0.006, 48.0, 72.0))
"""Noise on one number that is mostly wide and seldom all but none: what a search for scalar noise likes."""
DRAWS = 8_000_000
"""Noise values drawn for the negative control: draws × dimension, within 100 to 20,000 draws."""


def gaussian_rounds(sampling_probability: float, noise_multiplier: float, rounds: int) -> Event:
    """What so many rounds of user-level sampling release."""
    step = PoissonSubsampledGaussian(sampling_probability=sampling_probability, noise_multiplier=noise_multiplier)
    return Repeated(event=step, count=rounds)


def estimated_noise(sampling_probability: float, rounds: int, epsilon: float, delta: float) -> float:
    """The noise multiplier at which the Edgeworth *estimate* of ε is the target: EW-Tune's calibration.

    Raises:
        InvalidInput: No noise multiplier from 0.2 to 50 has that estimate.
    """

    def excess(noise_multiplier: float) -> float:
        event = gaussian_rounds(sampling_probability, noise_multiplier, rounds)
        return epsilon_estimate(event, delta, order=ORDER).value - epsilon

    if not excess(LEAST_NOISE) > 0 > excess(MOST_NOISE):
        raise InvalidInput("epsilon", epsilon, f"an estimate that noise from {LEAST_NOISE} to {MOST_NOISE} has")
    return float(scipy.optimize.brentq(excess, LEAST_NOISE, MOST_NOISE, xtol=1e-4))


def uneven_epsilon(
    sampling_probability: float, noise_multiplier: float, least_scales: Sequence[float], delta: float
) -> float:
    """Certified ε of rounds whose noise is uneven under one L2 clip, scales matched on average (ANADP's own form).

    A user may put its whole update where the noise is least, so a round is worth what the Gaussian is worth at σ times
    the least scale, and no less. The scales are taken to be public; ANADP's follow from raw gradients, for which no
    finite ε is known.

    Args:
        sampling_probability: Of a user, in a round.
        noise_multiplier: σ, the same for all rounds.
        least_scales: The smallest of the scales of each round, whose mean square over the parameters is 1.
        delta: δ.
    """
    counts = Counter(round(scale, 6) for scale in least_scales)
    parts = tuple(
        gaussian_rounds(sampling_probability, noise_multiplier * scale, count)
        for scale, count in sorted(counts.items())
    )
    return epsilon_bounds(Composed(events=parts), delta).upper


def scalar_law(epsilon: float) -> Law:
    """Randomised-scale Laplace noise that is ε-DP for one number of sensitivity 1, with δ = 0, exactly."""
    factor = scipy.optimize.brentq(lambda factor: pure_epsilon(rescaled(SHARP, factor)) - epsilon, 1e-6, 1e3)
    return rescaled(SHARP, float(factor))


def vector_delta(law: Law, epsilon: float, dimension: int, seed: int = 1) -> tuple[float, float]:
    """δ at ε of one release of a vector clipped in L2 under that noise, and five standard errors: LMO-DP's own form.

    By Monte Carlo for a user who moves all coordinates alike, so the true δ is at least this.
    """
    shift = np.full(dimension, 1 / math.sqrt(dimension))
    draws = int(np.clip(DRAWS / dimension, 100, 20_000))
    return monte_carlo_delta(law, shift, epsilon, draws, seed)
