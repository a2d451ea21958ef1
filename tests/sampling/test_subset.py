"""Uniform subsets: numpy's own, without a list of the whole population."""

import tracemalloc

import numpy as np
import pytest

from fedsim.randomness import stream
from fedsim.sampling import Poisson, Population, Streams, TruncatedPoisson, uniform_subset

SHARES = (0.0, 0.001, 0.0499, 0.0501, 0.11, 0.2499, 0.2501, 0.7, 1.0)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("population", [1, 60, 10_000, 10_001, 40_000])
def test_the_numbers_are_those_of_numpys_choice_and_so_is_what_follows(population: int, share: float) -> None:
    size = round(share * population)
    for seed in range(5):
        ours, theirs = stream(seed, "test"), stream(seed, "test")
        drawn = uniform_subset(ours, population, size)
        assert drawn.dtype == np.int64
        np.testing.assert_array_equal(
            drawn, np.sort(theirs.choice(population, size=size, replace=False, shuffle=False))
        )
        assert ours.random() == theirs.random()


@pytest.mark.parametrize("share", [0.06, 0.12, 0.24, 0.3])
def test_memory_is_that_of_the_subset(share: float) -> None:
    """Whatever the share: bytes for each that is drawn, where a list of all would be as many as 133."""
    population = 300_000
    tracemalloc.start()
    uniform_subset(stream(0, "test"), population, round(share * population))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 90 * share * population


@pytest.mark.parametrize("scheme", [Poisson(), TruncatedPoisson()])
def test_large_shares_are_drawn_as_before(scheme: Poisson | TruncatedPoisson) -> None:
    """A run that is resumed goes on with the cohorts that it would have had."""
    generator = Streams(3, "cohort")(7)
    count = int(generator.binomial(20_000, 0.08))
    expected = np.sort(generator.choice(20_000, size=count, replace=False, shuffle=False))
    drawn = scheme.draw(Population.of_users(20_000), 0.08, 7, Streams(3, "cohort"))
    np.testing.assert_array_equal(drawn, expected)
