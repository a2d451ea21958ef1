"""Corners of the accountant: losses and δ near their largest, releases that say nothing, odd questions."""

import mpmath
import numpy as np
import pytest

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import delta_bounds, delta_bounds_at, epsilon_bounds
from fedsim.privacy.bounds import Bounds
from fedsim.privacy.events import (
    Adjacency,
    Composed,
    Event,
    Gaussian,
    MixtureOfGaussians,
    PoissonSubsampledGaussian,
    Repeated,
)
from fedsim.privacy.gaussian_curve import gaussian_delta, log_delta
from fedsim.privacy.mechanisms.laplace.event import RandomisedScaleLaplace

pytestmark = pytest.mark.filterwarnings("error")
STEP = PoissonSubsampledGaussian(sampling_probability=0.01, noise_multiplier=1.0)


def laplace(scale: float, probability: float, group_size: int) -> RandomisedScaleLaplace:
    return RandomisedScaleLaplace(
        law=(("point", 1.0, scale, 0.0),), sampling_probability=probability, group_size=group_size
    )


def true_delta(setting: tuple[float, float, int], epsilon: float) -> float:
    """δ of one release that removes the user, to 40 digits: the loss rises from 0 to G, and has one value ε there."""
    with mpmath.workdps(40):
        scale, q, groups = mpmath.mpf(setting[0]), mpmath.mpf(setting[1]), setting[2]
        shares = [mpmath.binomial(groups, k) * q**k * (1 - q) ** (groups - k) for k in range(groups + 1)]

        def ratio(x: mpmath.mpf) -> mpmath.mpf:
            return sum(share * mpmath.exp(scale * (x - abs(x - k))) for k, share in enumerate(shares))

        low, high = mpmath.mpf(0), mpmath.mpf(groups)
        for _ in range(130):
            middle = (low + high) / 2
            low, high = (middle, high) if ratio(middle) < mpmath.exp(epsilon) else (low, middle)
        half = [mpmath.exp(-scale * abs(low - k)) / 2 for k in range(groups + 1)]
        above = sum(share * (half[k] if k <= low else 1 - half[k]) for k, share in enumerate(shares))
        return float(above - mpmath.exp(epsilon) * mpmath.exp(-scale * low) / 2)


@pytest.mark.parametrize("setting", [(5.0, 1e-3, 16), (6.0, 1e-3, 8), (3.0, 0.1, 4), (1.0, 0.3, 12), (0.2, 0.01, 40)])
def test_tails_near_the_largest_loss_hold_no_rounding_for_probability(setting: tuple[float, float, int]) -> None:
    """A tail of 1e-17 that was a difference of two numbers near 1 was certified as 1e-16, and could be negative."""
    event = laplace(*setting)
    scale, probability, groups = setting
    largest = groups * np.log1p(probability * np.expm1(scale))
    for part in (0.2, 0.6, 0.9, 0.98, 0.99, 0.999):
        found, true = delta_bounds(event, part * largest), true_delta(setting, part * largest)
        assert found.lower <= true * (1 + 1e-9)
        assert found.upper >= true * (1 - 1e-9)
    for delta in (1e-6, 1e-18):
        assert epsilon_bounds(event, delta, tolerance=0.02).lower <= largest
    assert delta_bounds(event, 1.005 * largest).lower == 0
    assert epsilon_bounds(Repeated(event=event, count=3), 1e-17, tolerance=0.01).upper <= 3 * largest * 1.001


@pytest.mark.parametrize("shift", [1e-6, 0.1, 1.0, 3.0])
def test_a_delta_between_the_roundings_of_the_largest_has_an_epsilon(shift: float) -> None:
    upper, lower = np.exp(log_delta(shift, 0.0))
    for delta in (lower, (lower + upper) / 2, upper, lower * (1 - 1e-9)):
        found = epsilon_bounds(Gaussian(noise_multiplier=1 / shift), float(delta))
        assert found.lower <= 1e-7
        assert gaussian_delta(shift, found.upper).lower <= delta


@pytest.mark.parametrize(
    "event",
    [
        MixtureOfGaussians(sensitivities=(0.0,), probabilities=(1.0,), noise_multiplier=1.0),
        MixtureOfGaussians(sensitivities=(0.0, 1.0), probabilities=(1.0, 0.0), noise_multiplier=1.0),
    ],
)
def test_a_release_that_says_nothing_costs_nothing(event: Event) -> None:
    assert epsilon_bounds(event, 1e-6) == Bounds(lower=0.0, upper=0.0)
    assert delta_bounds(event, 0.0) == Bounds(lower=0.0, upper=0.0)


@pytest.mark.parametrize("probability", [1e-12, 1e-16, 1e-25, 1e-101, 1e-300])
@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_who_hardly_ever_takes_part_is_hidden(probability: float, adjacency: Adjacency) -> None:
    """The loss is 0 in all its digits then; beside another release, where bounds may be coarse, it adds little."""
    rare = Repeated(
        event=PoissonSubsampledGaussian(sampling_probability=probability, noise_multiplier=1.0), count=10**6
    )
    assert epsilon_bounds(rare, 1e-5, adjacency=adjacency) == Bounds(lower=0.0, upper=0.0)
    other = Gaussian(noise_multiplier=2.0)
    alone = epsilon_bounds(other, 1e-6, adjacency=adjacency)
    both = epsilon_bounds(Composed(events=(other, rare)), 1e-6, adjacency=adjacency, tolerance=0.05)
    assert both.lower <= alone.upper
    assert alone.lower <= both.upper <= alone.upper * 1.1


@pytest.mark.parametrize("event", [Repeated(event=STEP, count=100), Gaussian(noise_multiplier=2.0)])
def test_a_curve_is_the_same_in_any_order(event: Event) -> None:
    rising, mixed = np.array([0.5, 1.0, 2.0]), np.array([2.0, 0.5, 1.0])
    for straight, turned in zip(delta_bounds_at(event, rising), delta_bounds_at(event, mixed), strict=True):
        np.testing.assert_array_equal(turned, straight[[2, 0, 1]])
    for wrong in (-0.1, np.nan):
        with pytest.raises(InvalidInput, match="at least 0"):
            delta_bounds_at(event, np.array([0.5, wrong]))


def test_a_delta_that_floats_cannot_follow_is_refused() -> None:
    assert epsilon_bounds(Repeated(event=STEP, count=1000), 1e-279).met
    with pytest.raises(InvalidInput, match="above 1e-280"):
        epsilon_bounds(Repeated(event=STEP, count=1000), 1e-281)


def sampled_delta(probability: float, noise: float, epsilon: float) -> mpmath.mpf:
    """δ of one Poisson-sampled Gaussian release, removing a user: its closed form."""
    with mpmath.workdps(60):
        q, odds = mpmath.mpf(probability), mpmath.exp(epsilon) - 1 + mpmath.mpf(probability)
        place = mpmath.mpf(noise) ** 2 * mpmath.log(odds / q) + 0.5
        joined, absent = (mpmath.erfc((place - mean) / noise / mpmath.sqrt(2)) / 2 for mean in (1, 0))
        return q * joined - odds * absent


@pytest.mark.parametrize("probability", [1e-6, 1e-3, 0.2, 0.9])
@pytest.mark.parametrize("noise", [0.3, 1.0])
@pytest.mark.parametrize("delta", [1e-100, 1e-255, 1e-262, 1e-279])
def test_bounds_bracket_a_closed_form_where_probabilities_underflow(
    probability: float, noise: float, delta: float
) -> None:
    """The lower one lay above the upper one, for probabilities that had become 0 were taken for 1e-320."""
    event = PoissonSubsampledGaussian(sampling_probability=probability, noise_multiplier=noise)
    found = epsilon_bounds(event, delta)
    assert sampled_delta(probability, noise, found.upper) <= delta <= sampled_delta(probability, noise, found.lower)


@pytest.mark.parametrize("noise", [1e-3, 1e-4, 1e-6, 1e-10, 1e-14, 1e-15])
@pytest.mark.parametrize("delta", [1e-5, 1e-200])
@pytest.mark.parametrize("count", [1, 1000])
def test_next_to_no_noise_has_a_huge_epsilon_and_ends(noise: float, delta: float, count: int) -> None:
    event = PoissonSubsampledGaussian(sampling_probability=0.1, noise_multiplier=noise)
    found = epsilon_bounds(Repeated(event=event, count=count), delta)
    assert np.isfinite(found.upper)
    assert found.upper >= 0.4 / noise**2  # with probability 0.1 the one release is seen, and nearly as it is


@pytest.mark.parametrize("noise", [1e-16, 1e-120, 1e-200])
def test_noise_whose_losses_are_no_floats_is_refused_in_a_sentence(noise: float) -> None:
    with pytest.raises(InvalidInput, match=f"^noise_multiplier is {noise}; it must be a number of at least 1e-15"):
        epsilon_bounds(PoissonSubsampledGaussian(sampling_probability=0.1, noise_multiplier=noise), 1e-5)
