"""Banded coefficients: errors of whole runs, optima, and sensitivities, against dense matrices and brute force."""

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from fedsim.config import OptimizerConfig
from fedsim.errors import InvalidInput
from fedsim.privacy.mechanisms.banded import workload as workload_module
from fedsim.privacy.mechanisms.banded.coefficients import (
    norm_above,
    on_grid,
    optimal_coefficients,
    participation_sensitivity,
    square_root_coefficients,
)
from fedsim.privacy.mechanisms.banded.workload import Workload
from fedsim.schedule import Schedule, schedule_factor
from server.optimizer import ServerOptimizer

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
    matrix = np.zeros((rounds, rounds))
    for column in range(rounds):
        part = np.asarray(coefficients)[: rounds - column]
        matrix[column : column + len(part), column] = part
    return matrix


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
    expected = weights(Workload.of_optimizer(rounds=rounds, **rule)) @ releases
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
        assert workload.error(coefficients) == pytest.approx(dense_error(workload, coefficients), rel=1e-10)


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


def test_the_square_root_is_one() -> None:
    root = banded_matrix(square_root_coefficients(30), 30)
    np.testing.assert_allclose(root @ root, np.tril(np.ones((30, 30))), atol=1e-12)


@pytest.mark.parametrize("monotone", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_optimal_coefficients_are_on_the_grid_and_better_than_their_neighbours(rule, monotone: bool) -> None:
    workload = Workload.of_optimizer(rounds=60, **rule)
    generator = np.random.default_rng(1)
    for bands in (1, 2, 5, 16, 60):
        found = optimal_coefficients(bands, workload, monotone=monotone)
        assert found == optimal_coefficients(bands, workload, monotone=monotone)
        assert found[0] == 1.0
        assert len(found) == bands
        assert all(type(value) is float and (value * 2**20).is_integer() for value in found)
        error = workload.error(found)
        assert error <= workload.error(on_grid(square_root_coefficients(bands)))
        if monotone:
            assert all(former >= later >= 0 for former, later in itertools.pairwise(found))
        for size in (1e-3, 1e-2, 0.1):
            for _ in range(20 if bands > 1 else 0):
                near = np.array(found) + size * np.append(0.0, generator.standard_normal(bands - 1))
                if monotone:
                    near = np.minimum.accumulate(np.clip(near, 0, 1))
                assert workload.error(near) >= error * (1 - 1e-9)


def test_limits_to_falling_coefficients_bind_where_the_optimum_rises() -> None:
    # Warm-up makes later releases weigh more, so the free optimum takes back more than it gave.
    workload = Workload(factors=tuple(1.5**s for s in range(30)))
    free, falling = optimal_coefficients(8, workload), optimal_coefficients(8, workload, monotone=True)
    assert workload.error(falling) >= workload.error(free)
    assert all(former >= later >= 0 for former, later in itertools.pairwise(falling))


@pytest.mark.parametrize("rounds", [2, 10, 50])
def test_two_bands_are_as_good_as_a_search_finds(rounds: int) -> None:
    workload = Workload.prefix_sums(rounds)
    best = minimize_scalar(lambda value: dense_error(workload, (1.0, value)), bounds=(-0.9, 0.99), method="bounded")
    assert workload.error(optimal_coefficients(2, workload)) == pytest.approx(best.fun, rel=1e-8)


@pytest.mark.parametrize("bands", [0, 11])
def test_more_bands_than_rounds_are_refused(bands: int) -> None:
    with pytest.raises(InvalidInput, match="bands"):
        optimal_coefficients(bands, Workload.prefix_sums(10))


def test_norms_are_rounded_up_and_no_further() -> None:
    generator = np.random.default_rng(2)
    for _ in range(200):
        values = on_grid(np.append(1.0, generator.normal(size=generator.integers(0, 40))))
        exact, norm = sum(Fraction(value) ** 2 for value in values), norm_above(values)
        assert Fraction(norm) ** 2 >= exact > Fraction(math.nextafter(norm, 0.0)) ** 2
    assert norm_above((1.0,)) == 1.0
    assert norm_above((3.0, 4.0)) == 5.0


def patterns(rounds: int, separation: int, participations: int) -> Iterator[tuple[int, ...]]:
    for count in range(1, participations + 1):
        for rows in itertools.combinations(range(rounds), count):
            if all(later - former >= separation for former, later in itertools.pairwise(rows)):
                yield rows


FALLING = [
    (1.0,),
    (1.0, 1.0, 1.0, 1.0),
    (1.0, 0.5),
    tuple(square_root_coefficients(9)),
    (1.0, 0.9, 0.9, 0.1, 0.0),
    (1.0, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2),
]


@pytest.mark.parametrize("coefficients", FALLING)
@pytest.mark.parametrize(("separation", "participations"), [(1, 9), (1, 2), (2, 3), (3, 9), (4, 2), (9, 1)])
def test_no_pattern_of_participation_moves_sums_further(coefficients, separation: int, participations: int) -> None:
    rounds = 9
    matrix = banded_matrix(coefficients, rounds)
    sensitivity = participation_sensitivity(coefficients, rounds, separation, participations)
    generator = np.random.default_rng(3)
    largest = 0.0
    for rows in patterns(rounds, separation, participations):
        columns = matrix[:, rows]
        largest = max(largest, float(np.linalg.norm(columns.sum(axis=1))))
        signs = np.array(list(itertools.product([1.0], *([[-1.0, 1.0]] * (len(rows) - 1)))))
        assert np.linalg.norm(columns @ signs.T, axis=0).max() <= sensitivity * (1 + 1e-12)
        vectors = generator.normal(size=(len(rows), 3))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        assert np.linalg.norm(columns @ vectors) <= sensitivity * (1 + 1e-12)
    assert sensitivity == pytest.approx(largest, rel=1e-12)


def test_up_to_the_separation_any_signs_are_allowed() -> None:
    rounds, coefficients = 11, (1.0, -0.7, 1.3)
    matrix = banded_matrix(coefficients, rounds)
    sensitivity = participation_sensitivity(coefficients, rounds, 3, 4)
    largest = max(
        float(np.linalg.norm(matrix[:, rows] @ np.array(signs)))
        for rows in patterns(rounds, 3, 4)
        for signs in itertools.product([-1.0, 1.0], repeat=len(rows))
    )
    assert sensitivity == pytest.approx(largest, rel=1e-12)


@pytest.mark.parametrize("coefficients", [(1.0, -0.5, 0.1), (1.0, 0.2, 0.9), (1.0, 1.5, 0.0), (1.0, math.nan, 0.0)])
def test_coefficients_beyond_the_formula_are_refused(coefficients) -> None:
    with pytest.raises(InvalidInput, match="coefficients"):
        participation_sensitivity(coefficients, 10, 2, 3)


def test_a_pattern_that_the_formula_misses_shows_why_rising_coefficients_are_refused() -> None:
    matrix = banded_matrix((1.0, 0.0, 0.0, 1.0), 8)
    densest = np.linalg.norm(matrix[:, [0, 2]].sum(axis=1))
    assert np.linalg.norm(matrix[:, [0, 3]].sum(axis=1)) > densest


def test_sensitivities_are_rounded_up() -> None:
    root = on_grid(square_root_coefficients(12))
    column = [Fraction(0)] * 40
    for first in (0, 5, 10):
        for row, value in enumerate(root, start=first):
            column[row] += Fraction(value)
    sensitivity = participation_sensitivity(root, 40, 5, 3)
    exact = sum(value**2 for value in column)
    assert Fraction(sensitivity) ** 2 >= exact > Fraction(math.nextafter(sensitivity, 0.0)) ** 2
