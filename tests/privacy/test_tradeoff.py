"""Curves of δ against ε and of an attacker's errors: certified, fine, and close to what is known exactly."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.spatial import ConvexHull

from fedsim.privacy.accountant import delta_bounds, epsilon_bounds
from fedsim.privacy.events import (
    Adjacency,
    BinomialMixtureGaussian,
    Composed,
    Event,
    FixedSizeSubsampledGaussian,
    Gaussian,
    PoissonSubsampledGaussian,
    Repeated,
)
from fedsim.privacy.tradeoff import PrivacyCurve, privacy_curve

pytestmark = pytest.mark.filterwarnings("error")
ALPHA = np.linspace(0, 1, 2001)


def poisson(probability: float, noise: float, steps: int = 1) -> Repeated:
    event = PoissonSubsampledGaussian(sampling_probability=probability, noise_multiplier=noise)
    return Repeated(event=event, count=steps)


def check(curve: PrivacyCurve, exact: np.ndarray, alpha: np.ndarray = ALPHA) -> None:
    bound = curve.tradeoff(alpha)
    assert (bound <= exact + 1e-9).all(), "no test does better than the exact trade-off"
    assert (bound >= exact - 1e-4).all()
    assert len(curve.epsilons) >= 300
    assert (np.diff(curve.upper) <= 0).all()
    assert (curve.lower <= curve.upper).all()


@pytest.mark.parametrize("mu", [0.02, 0.3, 1.0, 3.0, 8.0])
def test_a_gaussian_has_its_own_tradeoff(mu: float) -> None:
    exact = stats.norm.cdf(stats.norm.isf(ALPHA) - mu)
    check(privacy_curve(Gaussian(noise_multiplier=1 / mu)), exact)
    check(privacy_curve(poisson(1 - 1e-12, 1 / mu)), exact)
    check(privacy_curve(poisson(1 - 1e-12, 100 / mu, 10**4)), exact)


@pytest.mark.parametrize(("q", "noise"), [(0.1, 0.5), (0.5, 1.0), (0.3, 2.0)])
def test_one_sampled_step_has_the_hull_of_both_directions(q: float, noise: float) -> None:
    """Tests of N(0, σ²) against the mixture, and the other way round; the curve of both is their convex hull."""
    x = np.linspace(-12 * noise, 1 + 12 * noise, 20001)
    false = stats.norm.sf(x / noise)
    missed = (1 - q) * stats.norm.cdf(x / noise) + q * stats.norm.cdf((x - 1) / noise)
    points = np.concatenate([np.stack([false, missed], axis=1), np.stack([missed, false], axis=1), [[1, 1]]])
    hull = points[ConvexHull(points).vertices]
    below = np.unique(hull[hull.sum(axis=1) <= 1 + 1e-12], axis=0)
    check(privacy_curve(poisson(q, noise)), np.interp(ALPHA, below[:, 0], below[:, 1]) + 1e-7)


RUNS = [
    (poisson(0.01, 1.0, 1000), Adjacency.ADD_OR_REMOVE_ONE_USER),
    (poisson(0.01, 100.0, 10**6), Adjacency.REPLACE_ONE_USER),
    (
        Composed(
            events=(
                poisson(0.05, 3.0, 100),
                Repeated(
                    event=FixedSizeSubsampledGaussian(cohort_size=5, population_size=200, noise_multiplier=2.0),
                    count=50,
                ),
                Gaussian(noise_multiplier=5.0),
            )
        ),
        Adjacency.ADD_OR_REMOVE_ONE_USER,
    ),
    (
        Repeated(
            event=BinomialMixtureGaussian(group_size=16, sampling_probability=0.001, noise_multiplier=1.0), count=1000
        ),
        Adjacency.ADD_OR_REMOVE_ONE_USER,
    ),
]


@pytest.mark.parametrize(("event", "adjacency"), RUNS)
def test_the_whole_curve_agrees_with_single_answers(event: Event, adjacency: Adjacency) -> None:
    curve = privacy_curve(event, adjacency=adjacency)
    for place in (0, 60, 150, 300, 400):
        single = delta_bounds(event, float(curve.epsilons[place]), adjacency=adjacency)
        assert curve.lower[place] <= single.upper
        assert single.lower <= curve.upper[place]
        assert curve.upper[place] - curve.lower[place] <= 2e-4 + 0.01 * curve.upper[place]
    for delta in (1e-2, 1e-5, 1e-10):
        on_curve = float(np.interp(math.log(delta), np.log(curve.upper[::-1]), curve.epsilons[::-1]))
        assert on_curve == pytest.approx(epsilon_bounds(event, delta, adjacency=adjacency).upper, rel=0.01)


@pytest.mark.parametrize(("event", "adjacency"), RUNS)
def test_the_curve_is_smooth(event: Event, adjacency: Adjacency) -> None:
    """No kink is wider than a hundredth of the picture: the slope changes little from one point to the next."""
    bound = privacy_curve(event, adjacency=adjacency).tradeoff(np.linspace(0, 1, 101))
    turns = np.diff(bound, 2)[2:-2]
    assert (turns >= -1e-9).all(), "convex"
    assert (np.abs(np.diff(turns)) <= 1e-3 + 0.5 * turns[1:]).all()


def test_an_unbounded_delta_leaves_only_what_it_says() -> None:
    curve = PrivacyCurve(epsilons=np.array([0.0, 800.0]), upper=np.array([1.0, 1e-5]), lower=np.array([0.5, 0.0]))
    assert curve.tradeoff(np.array([0.0, 0.5])) == pytest.approx([1 - 1e-5, 0.0])


def test_nothing_released_leaves_guessing() -> None:
    curve = privacy_curve(Composed(events=()))
    np.testing.assert_allclose(curve.tradeoff(ALPHA), 1 - ALPHA)
