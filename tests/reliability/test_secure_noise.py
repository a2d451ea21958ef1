"""Noise from a cryptographic generator: exact in distribution, on the grid, never drawn twice."""

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedsim import secure_noise
from fedsim.secure_noise import CryptographicBits, SecureNoise, floor_normal


class GivenBits:
    """Words from a list, then from a seeded generator."""

    def __init__(self, words: list[int], seed: int = 0) -> None:
        self.first = words
        self.generator = np.random.default_rng(seed)

    def words(self, count: int) -> np.ndarray:
        taken, self.first = self.first[:count], self.first[count:]
        rest = self.generator.integers(2**64, size=count - len(taken), dtype=np.uint64)
        return np.concatenate([np.array(taken, dtype=np.uint64), rest])


@pytest.mark.parametrize(("numerator", "exponent"), [(1, 0), (3, 0), (1, 2), (5, 1)])
def test_every_grid_point_has_the_probability_of_its_cell(numerator: int, exponent: int) -> None:
    scale = numerator * 2**exponent
    drawn = floor_normal(GivenBits([], seed=7), 400_000, numerator, exponent)
    points = np.arange(-4 * scale, 4 * scale)
    cells = stats.norm.cdf((points + 1) / scale) - stats.norm.cdf(points / scale)
    seen = np.array([(drawn == point).sum() for point in points])
    expected = np.concatenate([cells * len(drawn), [len(drawn) * (1 - cells.sum())]])
    assert stats.chisquare([*seen, len(drawn) - seen.sum()], expected).pvalue > 1e-4


def test_fine_grids_give_the_normal_distribution() -> None:
    for exponent in (0, 13, 32):
        drawn = floor_normal(GivenBits([], seed=exponent), 200_000, 2**26, exponent) / 2.0 ** (26 + exponent)
        assert stats.kstest(drawn, "norm").pvalue > 1e-4


def test_the_table_of_whole_parts_has_128_right_bits() -> None:
    with mpmath.workdps(80):
        whole = mpmath.nsum(lambda k: mpmath.exp(-k * k / 2), [0, mpmath.inf])
        below = mpmath.mpf(0)
        for k, (high, low) in enumerate(zip(secure_noise._TABLE_HIGH, secure_noise._TABLE_LOW, strict=True)):
            below += mpmath.exp(-(mpmath.mpf(k) ** 2) / 2) / whole
            assert abs(mpmath.mpf(int(high)) * 2**64 + int(low) - below * 2**128) <= 1


def test_a_tie_of_64_bits_is_decided_by_the_next_64() -> None:
    high, low = int(secure_noise._TABLE_HIGH[0]), int(secure_noise._TABLE_LOW[0])
    words = np.array([high, high, high - 1, high + 1], dtype=np.uint64)
    assert secure_noise._whole_parts(words, GivenBits([low - 1, low])).tolist() == [0, 1, 0, 1]


def test_more_digits_decide_as_float64_does_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = floor_normal(GivenBits([], seed=3), 300, 2**25, 8)
    calls = []
    exactly = secure_noise._accepted_exactly

    class NoMoreBits:
        def words(self, count: int) -> np.ndarray:
            return np.zeros(count, dtype=np.uint64)

    monkeypatch.setattr(secure_noise, "UNDECIDED", 2.0)
    monkeypatch.setattr(
        secure_noise, "_accepted_exactly", lambda *place: calls.append(1) or exactly(*place[:3], NoMoreBits())
    )
    np.testing.assert_array_equal(floor_normal(GivenBits([], seed=3), 300, 2**25, 8), quick)
    assert len(calls) > 400


@settings(max_examples=50)
@given(
    st.integers(0, 15), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(1, 2**26), st.integers(0, 32)
)
def test_scaling_is_exact(k: int, high: int, low: int, numerator: int, exponent: int) -> None:
    arrays = (np.array([value], dtype=np.uint64) for value in (k, high, low))
    expected = (((k << 128) + (high << 64) + low) * numerator << exponent) >> 128
    assert secure_noise._scaled_floor(*arrays, numerator, exponent)[0] == expected


def test_what_is_released_from_exact_sums_lies_on_the_grid_of_the_sum() -> None:
    resolution = 2.0**-45
    total = np.random.default_rng(0).integers(-(2**46), 2**46, 50_000) * resolution
    noise = total.copy()
    SecureNoise(resolution).add_normal(noise, 0.3)
    steps = (noise - total) / min(resolution, 2.0**-34)
    assert np.array_equal(steps, np.rint(steps))
    assert np.std(noise - total) == pytest.approx(0.3, rel=0.02)
    # The low-order bits of the noised sum say nothing of those of the sum.
    assert abs(np.corrcoef(np.mod(total, 2.0**-40), np.mod(noise, 2.0**-40))[0, 1]) < 0.02


def test_what_is_released_lies_on_the_grid_of_the_noise_whatever_the_sum() -> None:
    total = np.random.default_rng(0).standard_normal(2_000)  # with digits that no grid of noise has
    source, std = SecureNoise(), 2.0**20
    step = source.grid_step(std)
    assert np.any(np.mod(total, step))
    source.add_normal(total, std)
    assert not np.any(np.mod(total, step))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("std", [1e-6, 1.0, 2.5, 1e9])
def test_float_sums_get_noise_of_the_asked_deviation(dtype: type, std: float) -> None:
    total = np.zeros(50_000, dtype=dtype)
    SecureNoise().add_normal(total, std)
    assert np.std(total.astype(np.float64)) == pytest.approx(std, rel=0.02)
    assert total.dtype == dtype


def test_the_deviation_is_never_rounded_down() -> None:
    for scale in np.random.default_rng(1).uniform(2**32, 2**33, 1000):
        numerator, exponent = secure_noise._rounded_up(float(scale))
        assert scale <= numerator * 2.0**exponent <= scale * (1 + 2.0**-25)


def test_no_two_releases_share_their_noise() -> None:
    first, second = np.zeros(20_000), np.zeros(20_000)
    SecureNoise().add_normal(first, 1.0)
    SecureNoise().add_normal(second, 1.0)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.04
    assert not np.array_equal(CryptographicBits().words(4), CryptographicBits().words(4))


def test_sums_that_the_grid_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        SecureNoise().add_normal(np.array([1e12]), 1e-6)
    with pytest.raises(ValueError, match="outside"):
        SecureNoise(2.0**-52).add_normal(np.zeros(3), 1e9)
