"""Correlated noise, number by number: against dense matrices, in exact arithmetic, in slices, in order, resumed."""

import dataclasses
from fractions import Fraction
from math import floor

import numpy as np
import pytest

from fedsim.errors import Failure, InvalidInput
from fedsim.plan import Plan, UlsPlan
from fedsim.privacy.mechanisms import MECHANISMS
from fedsim.privacy.mechanisms.banded import filter as filter_module
from fedsim.privacy.mechanisms.banded.coefficients import norm_above, on_grid
from fedsim.privacy.mechanisms.banded.filter import FloatFilter, GridFilter, NoiseFilter
from fedsim.privacy.mechanisms.noise import NoiseSource
from fedsim.randomness import StreamNoise
from fedsim.release import Release
from fedsim.sampling import CyclicPoisson
from fedsim.secure_noise import SecureNoise

COEFFICIENTS = [(1.0, 0.5), on_grid([1.0, 0.47, 0.29]), on_grid([1.0, -0.8, 0.3, 0.0, -0.2])]
SIZE, ROUNDS = 40, 12


class Given:
    """A source whose fresh noise is known."""

    def __init__(self, fresh: np.ndarray) -> None:
        self.fresh = iter(fresh)

    def add_normal(self, total: np.ndarray, std: float) -> None:
        total += (std * np.array([next(self.fresh) for _ in total])).astype(total.dtype)

    def generator(self) -> np.random.Generator:
        raise AssertionError


class KnownBits:
    """Words of a stream in place of a cryptographic generator's."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def words(self, count: int) -> np.ndarray:
        return self._generator.integers(0, 2**64, size=count, dtype=np.uint64)


class Recording(SecureNoise):
    """Secure noise that remembers ⌊ξ·2⁵²⌋."""

    def __init__(self, seed: int) -> None:
        super().__init__(bits=KnownBits(seed))
        self.fresh: list[int] = []

    def normal_steps(self, size: int, bits: int) -> np.ndarray:
        steps = super().normal_steps(size, bits)
        self.fresh += steps.tolist()
        return steps


def dense(c: tuple[float, ...], rounds: int = ROUNDS) -> np.ndarray:
    """C, float64 [rounds, rounds]."""
    return sum(value * np.eye(rounds, k=-lag) for lag, value in enumerate(c))  # type: ignore[return-value]


def next_round(chain: NoiseFilter, source: NoiseSource, total: np.ndarray, std: float, slices: int = 1) -> np.ndarray:
    """One round's noise added to a total, in place, as to so many parameters one after the other."""
    noise = chain.correlated(source)
    for part in np.array_split(total, slices):
        noise.add_normal(part, std)
    noise.finish()
    return total


@pytest.mark.parametrize(("wide", "tolerance"), [(True, 1e-13), (False, 1e-5)])
@pytest.mark.parametrize("c", COEFFICIENTS)
def test_float_noise_is_that_of_the_dense_inverse(c: tuple[float, ...], wide: bool, tolerance: float) -> None:
    fresh = np.random.default_rng(1).standard_normal((ROUNDS, SIZE))
    chain = FloatFilter(c, SIZE, wide=wide)
    kind = np.float64 if wide else np.float32
    for again in range(2):
        found = [next_round(chain, Given(row), np.full(SIZE, 7.0, dtype=kind), 0.3) - 7 for row in fresh]
        expected = 0.3 * np.linalg.norm(c) * np.linalg.inv(dense(c)) @ fresh
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=4 * tolerance)
        chain.restart()
        assert chain.rounds == 0, again


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("c", COEFFICIENTS)
def test_grid_noise_is_post_processing_of_the_gaussian_mechanism_in_exact_arithmetic(
    c: tuple[float, ...], slices: int
) -> None:
    sigma, clip = 1.3, 0.7
    chain = GridFilter(c, SIZE, sigma)
    step = sigma * clip * chain.norm * chain.enlarged * 2.0**-32
    sums = np.random.default_rng(2).integers(-(2**34), 2**34, size=(ROUNDS, SIZE))
    released, fresh = [], []
    for t in range(ROUNDS):
        source = Recording(t)
        noised = next_round(chain, source, sums[t] * step, sigma * clip, slices)
        released.append(np.rint(noised / step).astype(np.int64))
        fresh.append(source.fresh)
    exact = [Fraction(value) for value in c]
    for t in range(ROUNDS):
        for place in range(SIZE):
            lags = range(min(t + 1, len(c)))
            mixed = sum((exact[lag] * int(sums[t - lag][place]) for lag in lags), start=Fraction(0)) / 2**32
            gaussian = Fraction(floor((mixed + Fraction(fresh[t][place], 2**52)) * 2**52), 2**52)
            earlier = sum((exact[lag] * int(released[t - lag][place]) for lag in lags if lag), start=Fraction(0))
            assert released[t][place] == floor(gaussian * 2**32 - earlier + Fraction(1, 2))


def test_grid_noise_is_that_of_the_dense_inverse_enlarged_for_its_rounding() -> None:
    c, sigma = COEFFICIENTS[1], 1.3
    chain, fresh, found = GridFilter(c, SIZE, sigma), [], []
    for t in range(ROUNDS):
        source = Recording(t)
        found.append(next_round(chain, source, np.zeros(SIZE), 1.0))
        fresh.append(source.fresh)
    expected = np.linalg.inv(dense(c)) @ (np.array(fresh) * 2.0**-52)
    np.testing.assert_allclose(found, norm_above(c) * chain.enlarged * expected, atol=1e-7)
    # A coarse step is σ‖c‖ clip norms times 2⁻³²; two of them for each value may come to what one user changes.
    reach = 1 + 2 * np.sqrt(SIZE) * sigma * norm_above(c) * 2.0**-32
    assert 1 < reach <= chain.enlarged * (1 + 1e-15)


def test_slices_and_chunks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chunk, slices in ((1 << 18, 1), (7, 1), (1 << 18, 5), (3, 4)):
        monkeypatch.setattr(filter_module, "CHUNK", chunk)
        chain = FloatFilter(COEFFICIENTS[2], SIZE)
        totals = [
            next_round(chain, StreamNoise(5, "noise", t), np.ones(SIZE, dtype=np.float32), 2.0, slices)
            for t in range(ROUNDS)
        ]
        found.append(np.array(totals))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("kind", [FloatFilter, GridFilter])
def test_long_pasts_lie_on_disk_and_change_nothing(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def chain() -> NoiseFilter:
        made: NoiseFilter = kind(COEFFICIENTS[2], SIZE, *([1.0] if kind is GridFilter else []))
        return made

    chains = [chain()]
    monkeypatch.setattr(filter_module, "IN_MEMORY", 100)
    chains.append(chain())
    assert [isinstance(one.past, np.memmap) for one in chains] == [False, True]
    for _ in range(2):
        for t in range(ROUNDS):
            first, second = (next_round(one, Recording(t), np.zeros(SIZE), 1.0) for one in chains)
            np.testing.assert_array_equal(first, second)
        for one in chains:
            one.restart()


def plan_of(**changes: object) -> Plan:
    plan = UlsPlan(
        num_users=100,
        sampling_probability=0.1,
        group_size=1,
        clip_norm=0.5,
        noise_multiplier=1.5,
        steps=ROUNDS,
        delta=1e-5,
        sampling=CyclicPoisson(groups=5),
        noise_coefficients=COEFFICIENTS[2],
    )
    return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]


SIZES = {"h.0.attn.weight": 13, "h.0.attn.bias": 5, "h.1.attn.weight": 22}


def released(release: Release, round: int, attempt: int = 0) -> np.ndarray:
    return release.noised_mean(np.zeros(SIZE, dtype=np.float32), release.clip, round, attempt=attempt)


@pytest.mark.parametrize("mechanism", ["matrix-noise", "layer-noise", "adaptive-noise"])
def test_scales_by_parameter_change_no_bit_of_what_is_drawn(mechanism: str) -> None:
    plain, scaled = (Release(plan_of(mechanism=MECHANISMS.build(name)), SIZES, 3) for name in ("gaussian", mechanism))
    for t in range(ROUNDS):
        for release in (plain, scaled):
            release.clip_norm = 0.5 * 2.0 ** (t % 3)
            released(release, t)
        assert plain.chain is not None
        assert scaled.chain is not None
        np.testing.assert_array_equal(plain.chain.past, scaled.chain.past)


@pytest.mark.parametrize("seed", [7, None])
def test_a_chain_goes_on_from_its_state_and_begins_anew_with_nothing_of_the_one_before(seed: int | None) -> None:
    release = Release(plan_of(), SIZES, seed)
    for attempt in (0, 1):
        release.begin_chain(0, attempt)
        first = [released(release, t, attempt) for t in range(6)]
        again = Release(plan_of(), SIZES, seed)
        again.load_state({name: np.array(array) for name, array in release.state().items()})
        assert release.chain is not None
        assert again.chain is not None
        np.testing.assert_array_equal(again.chain.past, release.chain.past)
        if seed is not None:
            for t in range(6, 9):
                np.testing.assert_array_equal(released(again, t, attempt), released(release, t, attempt))
            alone = Release(plan_of(), SIZES, seed)
            alone.begin_chain(0, attempt)
            np.testing.assert_array_equal([released(alone, t, attempt) for t in range(6)], first)
    other = Release(plan_of(), SIZES, 7)
    other.begin_chain(3, 1)  # a chain may begin later, with noise of its own
    other_first = released(other, 3, 1)
    assert not np.isin(other_first, first).any()


def test_what_a_release_kept_brings_another_to_where_it_is() -> None:
    for seed in (7, None):
        ahead, behind = Release(plan_of(), SIZES, seed), Release(plan_of(), SIZES, seed)
        parameters = np.ones(SIZE, dtype=np.float32)
        for t in range(8):
            mean = released(ahead, t)
            ahead.observe(mean, parameters, {"units": 1.0}, t)
            behind.repeat(ahead.kept(mean), parameters, t, 0)
            assert ahead.chain is not None
            assert behind.chain is not None
            np.testing.assert_array_equal(behind.chain.past, ahead.chain.past)
            for name, array in ahead.state().items():
                np.testing.assert_array_equal(behind.state()[name], array)


def test_rounds_out_of_order_are_refused_and_change_nothing() -> None:
    release, alone = Release(plan_of(), SIZES, 7), Release(plan_of(), SIZES, 7)
    with pytest.raises(Failure, match="its chain goes on with round 0"):
        released(release, 1)
    for t in range(3):
        released(release, t)
        released(alone, t)
    for wrong in ((2, 0), (4, 0), (0, 0), (3, 1)):
        with pytest.raises(Failure, match="its chain goes on with round 3"):
            released(release, *wrong)
    np.testing.assert_array_equal(released(release, 3), released(alone, 3))


def test_noise_of_some_values_or_of_more_than_there_are_is_no_release() -> None:
    for count in (SIZE - 1, SIZE + 1):
        chain = FloatFilter((1.0, 0.5), SIZE)
        with pytest.raises((Failure, ValueError)):
            next_round(chain, StreamNoise(1, "noise"), np.zeros(count), 1.0)
        assert chain.rounds == 0


def test_a_round_that_was_released_before_is_drawn_to_its_end() -> None:
    chains = [FloatFilter(COEFFICIENTS[1], SIZE) for _ in range(2)]
    next_round(chains[0], StreamNoise(1, "noise"), np.zeros(SIZE, dtype=np.float32), 1.0)
    chains[1].correlated(StreamNoise(1, "noise")).finish(draw=True)
    np.testing.assert_array_equal(chains[0].past, chains[1].past)
    assert chains[1].rounds == 1


def test_what_the_grid_cannot_hold_is_refused() -> None:
    with pytest.raises(InvalidInput, match="noise_coefficients"):
        GridFilter((1.0, 1 / 3), SIZE, 1.0)
    with pytest.raises(InvalidInput, match=r"noise\.secure"):
        next_round(GridFilter((1.0, 0.5), SIZE, 1.0), StreamNoise(1, "noise"), np.zeros(SIZE), 1.0)
    with pytest.raises(Failure, match="too long"):
        next_round(GridFilter((1.0, 0.5), SIZE, 1.0), Recording(1), np.full(SIZE, 1e12), 1.0)
    with pytest.raises(InvalidInput, match=r"plan\.bands"):
        GridFilter((1.0, 0.5), SIZE, 1.0).correlated(Recording(1)).generator()
    far = GridFilter((1.0, -8.0), SIZE, 1.0)
    next_round(far, Recording(0), np.zeros(SIZE), 1.0)
    far.past[:] = 1 << 40
    with pytest.raises(Failure, match="beyond what its grid holds"):
        next_round(far, Recording(1), np.zeros(SIZE), 1.0)
