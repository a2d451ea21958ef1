"""What optimizers make of releases and their noise, against dense matrices and the server's own optimizer."""

import math

import numpy as np
import pytest
from scipy.linalg import toeplitz
from scipy.signal import lfilter

from fedsim.config import OptimizerConfig
from fedsim.errors import InvalidInput
from fedsim.optimizer import ServerOptimizer
from fedsim.privacy.mechanisms.banded import workload as workload_module
from fedsim.privacy.mechanisms.banded.coefficients import optimal_coefficients, square_root_coefficients
from fedsim.privacy.mechanisms.banded.workload import Workload, release_noise
from fedsim.schedule import Schedule, schedule_factor

RULES = [
    {"name": "sgd"},
    {"name": "sgd", "schedule": "linear"},
    {"name": "sgd", "schedule": "cosine", "warmup_rounds": 3},
    {"name": "momentum", "momentum": 0.7},
    {"name": "momentum", "schedule": "cosine", "momentum": 0.95},
    {"name": "adam"},
    {"name": "adam", "schedule": "linear", "warmup_rounds": 4},
    {"name": "adam", "warmup_rounds": 30},
]


def weights(workload: Workload) -> np.ndarray:
    """w_{t,i}, entry by entry."""
    factors, m, kept = workload.factors, workload.decay, 1 - workload.forgetting
    matrix = np.zeros((len(factors), len(factors)))
    for t in range(len(factors)):
        for i in range(t + 1):
            matrix[t, i] = sum(kept ** (t - s) * factors[s] * m ** (s - i) for s in range(i, t + 1))
    return matrix


def banded_matrix(coefficients, rounds: int) -> np.ndarray:
    """C, float64 [rounds, rounds]."""
    column = np.append(coefficients, np.zeros(rounds))[:rounds]
    return np.tril(toeplitz(column))


def dense_error(workload: Workload, coefficients) -> float:
    noise = weights(workload) @ np.linalg.inv(banded_matrix(coefficients, workload.rounds))
    return float(np.linalg.norm(coefficients) * math.sqrt((noise**2).sum(axis=1).mean()))


def test_the_learning_rate_rises_then_falls() -> None:
    def over(schedule: Schedule, warmup_rounds: int) -> list[float]:
        return [schedule_factor(schedule, warmup_rounds, done, 4 + warmup_rounds) for done in range(4 + warmup_rounds)]

    assert over("constant", 3) == [0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert over("linear", 0) == [1, 0.75, 0.5, 0.25]
    assert over("linear", 1) == [0.5, 1, 0.75, 0.5, 0.25]
    assert over("cosine", 0) == pytest.approx([1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4])


@pytest.mark.parametrize("rule", RULES)
def test_a_workload_is_what_the_servers_optimizer_does(rule) -> None:
    # Releases of ±1 keep Adam's second moment at exactly 1: its constant, without the approximation.
    rounds = 12
    releases = np.random.default_rng(0).choice([-1.0, 1.0], (rounds, 5)).astype(np.float32)
    parameters = np.zeros(5, dtype=np.float32)
    optimizer = ServerOptimizer(parameters, OptimizerConfig(learning_rate=1.0, **rule), rounds)
    moved = []
    for release in releases:
        optimizer.step(release)
        moved.append(-parameters.copy())
    expected = weights(Workload.of_optimizer(rounds=rounds, forgetting=0.0, **rule)) @ releases
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forgetting", [0.0, 0.2])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("in_memory", [True, False])
def test_the_error_is_that_of_the_dense_matrices(rule, in_memory: bool, forgetting: float, monkeypatch) -> None:
    if not in_memory:
        monkeypatch.setattr(workload_module, "MOST_ROUNDS_IN_MEMORY", 1)
    rounds = 14
    workload = Workload.of_optimizer(rounds=rounds, forgetting=forgetting, **rule)
    for coefficients in ((1.0,), (1.0, 0.5), (1.0, -0.4, 0.3), square_root_coefficients(rounds)):
        error = np.linalg.norm(coefficients) * math.sqrt(workload.mean_square(coefficients)[0])
        assert error == pytest.approx(dense_error(workload, coefficients), rel=1e-10)
        if not workload.second_decay:
            assert workload.error(coefficients) == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize("coefficients", [(1.0,), (1.0, 0.9), (1.0, 0.5, 0.2), square_root_coefficients(30)])
@pytest.mark.parametrize("forgetting", [0.0, 0.3])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_adams_steps_are_divided_by_the_noise_so_far(coefficients, forgetting: float, schedule) -> None:
    rounds = 40
    workload = Workload.of_optimizer("adam", rounds, schedule=schedule, forgetting=forgetting)
    inverse = np.linalg.inv(banded_matrix(coefficients, rounds))
    second, moments = 0.0, []
    for done, row in enumerate(inverse, start=1):
        second = 0.999 * second + 0.001 * (row @ row)
        moments.append(second / (1 - 0.999**done))
    factors = np.array(workload.factors) / np.sqrt(moments)
    divided = weights(Workload(factors=tuple(factors), decay=0.9, forgetting=forgetting))
    noise = np.linalg.norm(coefficients) * np.linalg.norm(divided @ inverse) / math.sqrt(rounds)
    slower = np.linalg.norm(weights(workload).sum(axis=1)) / np.linalg.norm(divided.sum(axis=1))
    assert workload.error(coefficients) == pytest.approx(noise * slower, rel=1e-10)
    if len(coefficients) == 1:
        assert workload.error(coefficients) == pytest.approx(dense_error(workload, coefficients), rel=1e-10)


def adam(releases: np.ndarray) -> np.ndarray:
    """Parameters after each round of the server's Adam, [T, P]."""
    parameters = np.zeros(releases.shape[1], dtype=np.float32)
    optimizer = ServerOptimizer(parameters, OptimizerConfig(name="adam", learning_rate=1.0), len(releases))
    moved = []
    for release in releases.astype(np.float32):
        optimizer.step(release)
        moved.append(parameters.astype(np.float64))
    return np.array(moved)


def noise_at_equal_progress(coefficients, rounds: int) -> float:
    """Measured: the spread of parameters that see noise alone, over how far a small constant signal moves them."""
    fresh = np.random.default_rng(5).standard_normal((rounds, 20_000))
    x = np.linalg.norm(coefficients) * lfilter([1.0], coefficients, fresh, axis=0)
    signal = adam(x + 0.1) - adam(x - 0.1)
    return float(np.sqrt((adam(x) ** 2).mean()) / np.sqrt((signal.mean(axis=1) ** 2).mean()))


@pytest.mark.parametrize("fitted", [Workload.prefix_sums(60), Workload.of_optimizer("momentum", 60)])
@pytest.mark.parametrize("bands", [2, 4])
def test_the_error_with_adam_is_what_adam_does_to_noise(bands: int, fitted: Workload) -> None:
    workload = Workload.of_optimizer("adam", 60, forgetting=0.0)
    coefficients = optimal_coefficients(bands, fitted)
    measured = noise_at_equal_progress(coefficients, 60) / noise_at_equal_progress((1.0,), 60)
    constant = workload.fits[0]
    ratio = workload.error(coefficients) / workload.error((1.0,))
    assert ratio == pytest.approx(measured, rel=0.06)
    assert constant.error(coefficients) / constant.error((1.0,)) < 0.93 * measured


def test_coefficients_for_adam_are_not_those_of_its_average() -> None:
    # Fitted to the average alone they make single releases so noisy that Adam's first steps stand out.
    workload = Workload.of_optimizer("adam", 200)
    average, _, sums = workload.fits
    for bands in (2, 4):
        found = workload.error(optimal_coefficients(bands, workload))
        assert found < 0.99 * workload.error(optimal_coefficients(bands, average))
        assert found <= workload.error(optimal_coefficients(bands, sums))


def test_the_noise_of_a_release_is_the_mean_of_all() -> None:
    c = np.array([1.0, 0.6, 0.1])
    inverse = np.linalg.inv(banded_matrix(c, 20))
    assert release_noise(c, 20) == pytest.approx(np.linalg.norm(c) * np.linalg.norm(inverse) / math.sqrt(20))
    assert release_noise((1.0,), 20) == 1.0


def test_independent_noise_adds_up_in_prefix_sums() -> None:
    for rounds in (1, 2, 50, 1000):
        assert Workload.prefix_sums(rounds).error((1.0,)) == pytest.approx(math.sqrt((rounds + 1) / 2), rel=1e-12)
    assert Workload.prefix_sums(9) == Workload.of_optimizer("sgd", 9)


def test_the_error_over_many_rounds_is_that_of_noise_filtered_one_by_one() -> None:
    rounds, coefficients = 300, (1.0, 0.6, 0.3, 0.1)
    workload = Workload.of_optimizer("momentum", rounds, schedule="linear", momentum=0.8)
    x = np.zeros((rounds, rounds))
    buffer, position, squares = np.zeros(rounds), np.zeros(rounds), []
    for t, factor in enumerate(workload.factors):
        x[t, t] = 1.0
        for lag in range(1, min(t, 3) + 1):
            x[t] -= coefficients[lag] * x[t - lag]
        buffer = 0.8 * buffer + x[t]
        position = position + factor * buffer
        squares.append(position @ position)
    expected = np.linalg.norm(coefficients) * math.sqrt(np.mean(squares))
    assert workload.error(coefficients) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    "rule",
    [
        {"name": "sgd"},
        {"name": "momentum", "forgetting": 0.1},
        {"name": "adam", "schedule": "cosine", "warmup_rounds": 5, "forgetting": 0.01},
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_the_gradient_is_that_of_the_error(rule, in_memory: bool, monkeypatch) -> None:
    if not in_memory:
        monkeypatch.setattr(workload_module, "MOST_ROUNDS_IN_MEMORY", 1)
    workload = Workload.of_optimizer(rounds=40, **rule)
    at = np.array([1.2, 0.5, -0.1, 0.2, 0.05])
    _, gradient = workload.mean_square(at)
    for index, slope in enumerate(gradient):
        step = np.eye(5)[index] * 1e-6
        difference = (workload.mean_square(at + step)[0] - workload.mean_square(at - step)[0]) / 2e-6
        assert slope == pytest.approx(difference, rel=1e-5)


def test_an_error_past_all_numbers_is_infinite() -> None:
    workload = Workload.prefix_sums(2000)
    assert workload.error((1.0, 3.0)) == math.inf
    assert workload.mean_square((1.0, 3.0))[0] == math.inf
    assert Workload.of_optimizer("adam", 2000).error((1.0, 3.0)) == math.inf


@pytest.mark.parametrize("coefficients", [(), (0.0, 1.0), (1.0,) * 6])
def test_coefficients_that_no_run_can_use_are_refused(coefficients) -> None:
    with pytest.raises(InvalidInput, match="coefficients is"):
        Workload.prefix_sums(5).error(coefficients)


def test_workloads_that_no_optimizer_has_are_refused() -> None:
    for build in (
        lambda: Workload.of_optimizer("lion", 5),
        lambda: Workload.of_optimizer("sgd", 0),
        lambda: Workload.of_optimizer("momentum", 5, momentum=1.0),
        lambda: Workload(factors=()),
        lambda: Workload(factors=(0.0, 0.0)),
        lambda: Workload(factors=(1.0, math.nan)),
        lambda: Workload(factors=(1.0,), decay=1.0),
        lambda: Workload(factors=(1.0,), forgetting=-0.1),
    ):
        with pytest.raises(InvalidInput):
            build()
