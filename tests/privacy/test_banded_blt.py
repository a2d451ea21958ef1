"""Buffered linear Toeplitz noise: its recursion, the condition on its parameters, sensitivity and optimum."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.signal import lfilter

from fedsim.errors import InvalidInput
from fedsim.privacy.mechanisms.banded import blt
from fedsim.privacy.mechanisms.banded.blt import BufferedToeplitz
from fedsim.privacy.mechanisms.banded.coefficients import optimal_coefficients
from fedsim.privacy.mechanisms.banded.workload import Workload

NOISES = [
    BufferedToeplitz(weights=(0.3,), decays=(0.9,)),
    BufferedToeplitz(weights=(0.18, 0.33), decays=(0.4, 0.96)),
    BufferedToeplitz(weights=(0.1, 0.2, 0.05), decays=(0.3, 0.5, 0.999)),
    BufferedToeplitz(weights=(1e-9, 0.1), decays=(0.5, 0.5)),
]


def matrix(coefficients: np.ndarray) -> np.ndarray:
    rounds = len(coefficients)
    return np.array([[coefficients[i - j] if i >= j else 0.0 for j in range(rounds)] for i in range(rounds)])


@pytest.mark.parametrize("noise", NOISES)
def test_buffers_apply_the_inverse(noise: BufferedToeplitz) -> None:
    rounds = 30
    fresh = np.random.default_rng(0).normal(size=(rounds, 4))
    buffers = np.zeros((len(noise.decays), 4))
    x = np.array([noise.correlate(row, buffers) for row in fresh])
    np.testing.assert_allclose(matrix(noise.coefficients(rounds)) @ x, fresh, atol=1e-10)


def test_buffers_of_float32_apply_what_is_accounted() -> None:
    noise, rounds = BufferedToeplitz(weights=(0.1,), decays=(0.9999999,)), 50_000
    buffers = np.zeros((1, 1), dtype=np.float32)
    x = noise.correlate(np.ones(1, dtype=np.float32), buffers)
    assert x.dtype == np.float32
    decay = np.float64(noise.correlate(np.zeros(1, dtype=np.float32), buffers)[0]) / -0.1
    assert decay == pytest.approx(1.0, abs=1e-6)
    held = np.array(noise.decays, dtype=np.float32).astype(np.float64)
    applied = np.float32(noise.weights[0]) * held ** np.arange(rounds - 1)
    np.testing.assert_allclose(noise.coefficients(rounds)[1:], applied, rtol=1e-12)


@pytest.mark.parametrize("noise", NOISES)
def test_coefficients_fall_and_every_later_round_takes_back(noise: BufferedToeplitz) -> None:
    c = noise.coefficients(60)
    assert c[0] == 1.0
    assert (c >= 0).all()
    assert (np.diff(c) <= 0).all()
    inverse = lfilter([1.0], c, np.append(1.0, np.zeros(59)))
    assert (inverse[1:] <= 0).all()


def test_past_the_condition_rounds_add_to_the_noise() -> None:
    with pytest.raises(InvalidInput, match="below 1"):
        BufferedToeplitz(weights=(0.7,), decays=(0.5,))
    c = np.append(1.0, 0.7 * 0.5 ** np.arange(9))
    assert (np.diff(c) <= 0).all()
    assert lfilter([1.0], c, np.append(1.0, np.zeros(9)))[2] > 0


@pytest.mark.parametrize(
    ("weights", "decays"),
    [
        ((), ()),
        ((0.1,), (0.5, 0.6)),
        ((0.1,), (1.0,)),
        ((0.1,), (0.0,)),
        ((-0.1, 0.2), (0.5, 0.6)),
        ((0.3, 0.3), (0.5, 0.6)),
        ((math.nan,), (0.5,)),
        ((0.1,), (math.nan,)),
        ((0.01,) * 9, (0.5,) * 9),
    ],
)
def test_parameters_that_no_noise_may_have_are_refused(weights, decays) -> None:
    with pytest.raises(InvalidInput):
        BufferedToeplitz(weights=weights, decays=decays)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("separation", "participations"), [(1, 8), (2, 3), (3, 2), (3, 8), (8, 1)])
def test_no_pattern_of_participation_moves_sums_further(noise, separation: int, participations: int) -> None:
    rounds = 8
    c = matrix(noise.coefficients(rounds))
    largest = 0.0
    for count in range(1, participations + 1):
        for rows in itertools.combinations(range(rounds), count):
            if all(later - former >= separation for former, later in itertools.pairwise(rows)):
                signs = np.array(list(itertools.product([-1.0, 1.0], repeat=count)))
                largest = max(largest, float(np.linalg.norm(c[:, rows] @ signs.T, axis=0).max()))
    assert noise.sensitivity(rounds, separation, participations) == pytest.approx(largest, rel=1e-11)


def test_the_sensitivity_is_above_that_of_the_parameters_taken_exactly() -> None:
    rounds, separation, generator = 12, 4, np.random.default_rng(2)
    for _ in range(200):
        noise = BufferedToeplitz(
            weights=tuple(generator.uniform(0.05, 0.2, 2)), decays=(0.7, generator.uniform(0.7, 1))
        )
        pairs = [(Fraction(w), Fraction(d)) for w, d in zip(noise.weights, noise.decays, strict=True)]
        c = [Fraction(1)] + [sum(w * d**lag for w, d in pairs) for lag in range(rounds - 1)]
        column = [sum(c[row - first] for first in (0, 4, 8) if first <= row) for row in range(rounds)]
        exact = sum(value**2 for value in column)
        assert exact <= Fraction(noise.sensitivity(rounds, separation, 3)) ** 2 < exact * (1 + Fraction(1, 10**11))


@pytest.mark.parametrize(("separation", "participations"), [(1, 1), (10, 4), (7, 100)])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_the_gradient_is_that_of_the_squared_error(optimizer: str, separation: int, participations: int) -> None:
    workload = Workload.of_optimizer(optimizer, 40, schedule="linear")
    at = np.array([-0.5, -1.0, 0.3, 2.0])
    value, gradient = blt._log_square(at, workload, separation, participations)
    weights, decays = blt._parameters(at)
    noise = BufferedToeplitz(weights=tuple(weights), decays=tuple(decays))
    assert value == pytest.approx(2 * math.log(noise.error(workload, separation, participations)), rel=1e-6)
    for index, slope in enumerate(gradient):
        step = np.eye(4)[index] * 1e-6
        upper, _ = blt._log_square(at + step, workload, separation, participations)
        lower, _ = blt._log_square(at - step, workload, separation, participations)
        assert slope == pytest.approx((upper - lower) / 2e-6, rel=1e-4, abs=1e-8)


def test_a_few_buffers_do_what_a_hundred_bands_do() -> None:
    workload = Workload.prefix_sums(100)
    bands = workload.error(optimal_coefficients(100, workload))
    errors = [BufferedToeplitz.optimal(count, workload, 1, 1).error(workload, 1, 1) for count in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2] > bands
    assert errors[2] < 1.002 * bands


@pytest.mark.parametrize(("separation", "participations"), [(1, 1), (20, 5), (1, 100)])
def test_the_optimum_is_better_than_its_neighbours(separation: int, participations: int) -> None:
    workload = Workload.of_optimizer("momentum", 100, schedule="linear")
    found = BufferedToeplitz.optimal(2, workload, separation, participations)
    error, generator = found.error(workload, separation, participations), np.random.default_rng(1)
    for size in (1e-3, 1e-2, 0.1):
        for _ in range(20):
            weights = np.array(found.weights) * np.exp(size * generator.standard_normal(2))
            decays = 1 - (1 - np.array(found.decays)) * np.exp(size * generator.standard_normal(2))
            if (decays > 0).all() and (weights / decays).sum() < 1:
                near = BufferedToeplitz(weights=tuple(weights), decays=tuple(decays))
                assert near.error(workload, separation, participations) >= error * (1 - 1e-5)


@pytest.mark.parametrize(("buffers", "separation", "participations"), [(0, 1, 1), (9, 1, 1), (2, 0, 1), (2, 1, 0)])
def test_searches_out_of_range_are_refused(buffers: int, separation: int, participations: int) -> None:
    with pytest.raises(InvalidInput, match=r"buffers|separation|participations"):
        BufferedToeplitz.optimal(buffers, Workload.prefix_sums(10), separation, participations)


def test_a_single_round_has_a_noise_too() -> None:
    assert BufferedToeplitz.optimal(2, Workload.prefix_sums(1), 1, 1).error(Workload.prefix_sums(1), 1, 1) >= 1
