"""Random events over all that the accountant promises: kinds, T to 10⁷, ε from 1e-3 to 1e3, δ from 1e-2 to 1e-18."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedsim.privacy.events import (
    Adjacency,
    BinomialMixtureGaussian,
    Composed,
    Event,
    FixedSizeSubsampledGaussian,
    Gaussian,
    MixtureOfGaussians,
    PoissonSubsampledGaussian,
    Repeated,
    TruncatedPoissonSubsampledGaussian,
)
from fedsim.privacy.mechanisms.laplace.event import RandomisedScaleLaplace


@dataclass(frozen=True)
class Question:
    """What ε is at δ.

    Attributes:
        event: What was released.
        delta: δ.
        adjacency: The change that must stay hidden.
    """

    event: Event
    delta: float
    adjacency: Adjacency


def question(seed: int) -> Question:
    """One question; the kind of event goes round with the seed, all else is random."""
    draw = np.random.default_rng(seed)
    steps = round(10 ** draw.uniform(0, 7))
    delta = 10 ** draw.uniform(-18, -2)
    epsilon = 10 ** draw.uniform(-3, 3)
    adjacency = list(Adjacency)[draw.integers(2)]
    kind = KINDS[seed % len(KINDS)]
    if kind is _laplace:
        # Few releases of plain Laplace noise are almost a lattice, whose sums take the check longer than a test may.
        steps, epsilon, adjacency = max(steps, 10_000), max(epsilon, 0.3), Adjacency.ADD_OR_REMOVE_ONE_USER
    # A Gaussian of this shift μ has about that ε; what one step may add to it follows.
    reach = math.sqrt(2 * math.log(1 / delta))
    shift = (math.sqrt(reach**2 + 2 * epsilon) - reach) / math.sqrt(steps)
    return Question(Repeated(event=kind(draw, shift), count=steps), delta, adjacency)


def _chance(draw: np.random.Generator, shift: float) -> tuple[float, float]:
    """A sampling probability, and the noise at which one sampled step adds so much to the composed shift."""
    chance = min(1.0, max(10 ** draw.uniform(-4, 0), shift / 3))
    return chance, 1 / math.sqrt(math.log1p((shift / chance) ** 2))


def _gaussian(draw: np.random.Generator, shift: float) -> Event:
    return Gaussian(noise_multiplier=1 / shift)


def _poisson(draw: np.random.Generator, shift: float) -> Event:
    chance, noise = _chance(draw, shift)
    return PoissonSubsampledGaussian(sampling_probability=chance, noise_multiplier=noise)


def _binomial(draw: np.random.Generator, shift: float) -> Event:
    size = int(2 ** draw.uniform(0, 6))
    chance, noise = _chance(draw, shift / size)
    return BinomialMixtureGaussian(group_size=size, sampling_probability=chance, noise_multiplier=noise)


def _mixture(draw: np.random.Generator, shift: float) -> Event:
    weights = draw.dirichlet(np.ones(3))
    return MixtureOfGaussians(
        sensitivities=tuple(np.sort(draw.uniform(0, 2, 3))),
        probabilities=tuple(weights / weights.sum()),
        noise_multiplier=1 / shift,
    )


def _fixed_size(draw: np.random.Generator, shift: float) -> Event:
    users = int(10 ** draw.uniform(1, 6))
    chance, noise = _chance(draw, shift / 2)
    cohort = min(max(1, int(users * chance)), users)
    return FixedSizeSubsampledGaussian(cohort_size=cohort, population_size=users, noise_multiplier=2 * noise)


def _truncated_poisson(draw: np.random.Generator, shift: float) -> Event:
    users = int(10 ** draw.uniform(1, 6))
    chance, noise = _chance(draw, shift / 2)
    mean, deviation = users * chance, math.sqrt(users * chance * (1 - chance))
    return TruncatedPoissonSubsampledGaussian(
        sampling_probability=chance,
        population_size=users,
        most_units=max(1, round(mean + draw.uniform(-2, 8) * deviation)),
        noise_multiplier=2 * noise,
    )


def _several(draw: np.random.Generator, shift: float) -> Event:
    kinds = draw.permutation(np.array([_gaussian, _poisson, _binomial, _mixture], dtype=object))[:2]
    return Composed(events=tuple(kind(draw, shift / math.sqrt(2)) for kind in kinds))


def _laplace(draw: np.random.Generator, shift: float) -> Event:
    chance = min(1.0, max(10 ** draw.uniform(-2, 0), shift / 3))
    scale = min(math.log1p(shift / chance), 20.0)
    return RandomisedScaleLaplace(law=(("point", 1.0, scale, 0.0),), sampling_probability=chance, group_size=1)


SAMPLED = (_poisson, _binomial, _mixture, _fixed_size, _several)
KINDS: tuple[Callable[[np.random.Generator, float], Event], ...] = (
    _gaussian,
    *SAMPLED,
    _truncated_poisson,
    *SAMPLED,
    _laplace,
)
"""In the order of the seeds."""
