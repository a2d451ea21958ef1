"""Calibration meets its target from upper bounds alone, and closely."""

import pytest

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.calibration import (
    Calibration,
    calibrate_group_size,
    calibrate_noise_multiplier,
    calibrate_sampling_probability,
    calibrate_steps,
)
from fedsim.privacy.events import Adjacency, BinomialMixtureGaussian, Composed, Event, Gaussian, Repeated


def event(noise: float = 2.0, group_size: int = 4, probability: float = 0.01, steps: int = 500) -> Event:
    step = BinomialMixtureGaussian(group_size=group_size, sampling_probability=probability, noise_multiplier=noise)
    return Repeated(event=step, count=steps)


def check(found: Calibration, make, next_value: float, epsilon: float, delta: float, adjacency=None) -> None:
    """It meets the target, and the next value towards less privacy does not."""
    options = {} if adjacency is None else {"adjacency": adjacency}
    assert found.epsilon.lower <= found.epsilon.upper <= epsilon
    assert found.epsilon.upper >= 0.97 * epsilon or next_value == int(next_value)
    assert found.epsilon.gap <= 1e-3
    assert epsilon_bounds(make(found.value), delta, **options).upper <= epsilon * (1 + 1e-3)
    assert epsilon_bounds(make(next_value), delta, **options).upper > epsilon * (1 - 1e-3)


@pytest.mark.parametrize("epsilon", [0.05, 2.0, 30.0])
@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_noise(epsilon: float, adjacency: Adjacency) -> None:
    found = calibrate_noise_multiplier(event, epsilon=epsilon, delta=1e-6, adjacency=adjacency)
    check(found, event, found.value * (1 - 2e-4), epsilon, 1e-6, adjacency)


@pytest.mark.parametrize("epsilon", [0.05, 2.0, 30.0])
@pytest.mark.parametrize("precision", [1e-2, 1e-4])
@pytest.mark.parametrize("guess", [0.2, 0.9, 1.0, 1.5, 20.0])
def test_noise_from_a_guess_is_as_good_as_from_none(epsilon: float, precision: float, guess: float) -> None:
    """It meets the target too, and is no farther above the least noise than the precision asks."""
    least = calibrate_noise_multiplier(event, epsilon=epsilon, delta=1e-6).value
    target = {"epsilon": epsilon, "delta": 1e-6, "tolerance": 1e-4}
    found = calibrate_noise_multiplier(event, **target, precision=precision, near=guess * least)
    check(found, event, found.value * (1 - 2 * precision), epsilon, 1e-6)
    assert found.value <= least * (1 + precision + 1e-4)


def counted(noises: list[float], make=event):
    """The event for a noise multiplier, which is noted."""

    def noted(noise: float) -> Event:
        noises.append(noise)
        return make(noise)

    return noted


def test_a_guess_that_was_right_takes_one_more_look() -> None:
    looked_at: list[float] = []
    target = {"epsilon": 2.0, "delta": 1e-6, "precision": 1e-3}
    right = calibrate_noise_multiplier(event, **target, near=1.0).value
    assert calibrate_noise_multiplier(counted(looked_at), **target, near=right).value == right
    assert len(set(looked_at)) == 2


def after_others(noise: float) -> Event:
    """Beside releases that its noise does not change, so that ε hardly falls."""
    return Composed(events=(event(0.8), event(noise)))


@pytest.mark.parametrize(
    ("above", "precision", "guess"), [(1.0002, 1e-3, 50.0), (1.001, 1e-4, 1e4), (1.01, 1e-3, 20.0)]
)
def test_a_guess_is_no_excuse_where_epsilon_hardly_falls(above: float, precision: float, guess: float) -> None:
    """Where ε is within a thousandth of the target the noise may be four times too much."""
    looked_at: list[float] = []
    target = {"epsilon": above * epsilon_bounds(event(0.8), 1e-6, tolerance=1e-5).upper, "delta": 1e-6}
    target |= {"tolerance": 1e-5, "precision": precision}
    least = calibrate_noise_multiplier(after_others, **target).value
    found = calibrate_noise_multiplier(counted(looked_at, after_others), **target, near=guess)
    assert found.epsilon.upper <= target["epsilon"]
    assert found.value <= least * (1 + 3 * precision)
    assert len(set(looked_at)) < 40


def test_a_target_out_of_reach_is_refused_soon() -> None:
    looked_at: list[float] = []
    target = {"epsilon": 0.99 * epsilon_bounds(event(0.8), 1e-6).lower, "delta": 1e-6}
    with pytest.raises(InvalidInput, match="at least"):
        calibrate_noise_multiplier(counted(looked_at, after_others), **target, near=5.0)
    assert len(set(looked_at)) < 40


def test_noise_of_the_plain_gaussian_is_exact() -> None:
    """σ for (1, 1e-5), from the analytic Gaussian mechanism: 3.7306."""
    found = calibrate_noise_multiplier(lambda noise: Gaussian(noise_multiplier=noise), epsilon=1.0, delta=1e-5)
    assert found.value == pytest.approx(3.730632, rel=2e-4)


def test_steps() -> None:
    found = calibrate_steps(lambda steps: event(steps=steps), epsilon=3.0, delta=1e-6)
    check(found, lambda steps: event(steps=steps), found.value + 1, 3.0, 1e-6)


def test_sampling_probability() -> None:
    found = calibrate_sampling_probability(lambda p: event(probability=p), epsilon=3.0, delta=1e-6)
    check(found, lambda p: event(probability=p), found.value * (1 + 2e-4), 3.0, 1e-6)


def test_group_size() -> None:
    found = calibrate_group_size(lambda group: event(group_size=group), epsilon=6.0, delta=1e-6)
    check(found, lambda group: event(group_size=group), found.value + 1, 6.0, 1e-6)


def test_an_impossible_target_says_why() -> None:
    with pytest.raises(InvalidInput, match="at least") as error:
        calibrate_steps(lambda steps: event(noise=0.3, group_size=8, steps=steps), epsilon=0.1, delta=1e-9)
    assert error.value.field == "epsilon"
    with pytest.raises(InvalidInput, match="epsilon"):
        calibrate_noise_multiplier(event, epsilon=-1.0, delta=1e-6)
