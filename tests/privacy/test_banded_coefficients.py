"""Banded coefficients: optima against searches and neighbours, sensitivities against every pattern."""

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from scipy.linalg import toeplitz
from scipy.optimize import minimize_scalar

from fedsim.errors import InvalidInput
from fedsim.privacy.mechanisms.banded.coefficients import (
    norm_above,
    on_grid,
    optimal_coefficients,
    participation_sensitivity,
    square_root_coefficients,
)
from fedsim.privacy.mechanisms.banded.workload import Workload

RULES = [
    {"name": "sgd"},
    {"name": "sgd", "schedule": "cosine", "warmup_rounds": 5},
    {"name": "momentum", "schedule": "linear"},
    {"name": "momentum", "momentum": 0.99, "forgetting": 0.05},
    {"name": "adam"},
    {"name": "adam", "schedule": "linear", "warmup_rounds": 30},
]


def banded_matrix(coefficients, rounds: int) -> np.ndarray:
    """C, float64 [rounds, rounds]."""
    column = np.append(coefficients, np.zeros(rounds))[:rounds]
    return np.tril(toeplitz(column))


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
                if workload.second_decay:
                    continue
                if monotone:
                    near = np.minimum.accumulate(np.clip(near, 0, 1))
                assert workload.error(near) >= error * (1 - 1e-9)


def test_falling_coefficients_are_the_best_of_their_kind_where_others_are_better() -> None:
    # Rounds of alternating weight: noise is best taken back two rounds later.
    workload = Workload(factors=(1.0, 0.2) * 15)
    free, falling = optimal_coefficients(3, workload), optimal_coefficients(3, workload, monotone=True)
    assert free[1] < free[2]
    grid = np.linspace(0, 1, 41)
    every = min(workload.error((1.0, first, second)) for first in grid for second in grid if second <= first)
    assert workload.error(free) < workload.error(falling) <= every
    generator = np.random.default_rng(4)
    longer = optimal_coefficients(6, workload, monotone=True)
    for size in (1e-3, 1e-2, 0.1):
        for _ in range(30):
            near = np.array(longer) + size * np.append(0.0, generator.standard_normal(5))
            near = np.minimum.accumulate(np.clip(near, 0, 1))
            assert workload.error(near) >= workload.error(longer) * (1 - 1e-9)


def test_coefficients_have_no_negative_zeros() -> None:
    found = optimal_coefficients(3, Workload(factors=(1.0, 0.0, 0.0) * 10))
    assert [math.copysign(1.0, value) for value in found] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("rounds", [2, 10, 50])
def test_two_bands_are_as_good_as_a_search_finds(rounds: int) -> None:
    workload = Workload.prefix_sums(rounds)
    best = minimize_scalar(lambda value: workload.error((1.0, value)), bounds=(-0.9, 0.99), method="bounded")
    assert workload.error(optimal_coefficients(2, workload)) == pytest.approx(best.fun, rel=1e-8)


@pytest.mark.parametrize("bands", [0, 11])
def test_more_bands_than_rounds_are_refused(bands: int) -> None:
    with pytest.raises(InvalidInput, match="bands"):
        optimal_coefficients(bands, Workload.prefix_sums(10))


def test_norms_are_rounded_up_and_no_further() -> None:
    generator = np.random.default_rng(2)
    for _ in range(2000):
        values = np.append(1.0, generator.normal(size=generator.integers(0, 6))).tolist()
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


@pytest.mark.parametrize("coefficients", [(1.0, -0.5, 0.1), (1.0, 0.5, -0.1), (1.0, 0.2, 0.9), (1.0, 1.5, 0.0)])
def test_coefficients_beyond_the_formula_are_refused(coefficients) -> None:
    with pytest.raises(InvalidInput, match="coefficients"):
        participation_sensitivity(coefficients, 10, 2, 3)


@pytest.mark.parametrize("separation", [2, 5])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_coefficients_that_are_no_numbers_are_refused(value: float, separation: int) -> None:
    with pytest.raises(InvalidInput, match="coefficients"):
        participation_sensitivity((1.0, value, 0.0), 10, separation, 3)


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
