"""Keyed streams: the same arguments draw the same numbers, any other argument draws others."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedsim import randomness
from fedsim.randomness import StreamNoise, derived_seed, stream

places = st.lists(st.integers(0, 2**40), max_size=3)


@given(st.integers(0, 2**62), st.text(max_size=8), places)
def test_a_stream_depends_on_its_arguments_alone(seed: int, purpose: str, place: list[int]) -> None:
    np.testing.assert_array_equal(
        stream(seed, purpose, *place).integers(2**63, size=4), stream(seed, purpose, *place).integers(2**63, size=4)
    )


@given(st.integers(0, 2**62), st.sampled_from(["noise", "cohort"]), places, st.integers(0, 3))
def test_another_argument_gives_another_stream(seed: int, purpose: str, place: list[int], which: int) -> None:
    others = [(seed + 1, purpose, place), (seed, purpose + "x", place), (seed, purpose, [*place, 0])]
    others.append((seed, purpose, [place[0] + 1, *place[1:]]) if place else (seed + 2, purpose, place))
    other_seed, other_purpose, other_place = others[which]
    drawn = stream(seed, purpose, *place).integers(2**63, size=4)
    other = stream(other_seed, other_purpose, *other_place).integers(2**63, size=4)
    assert not np.array_equal(drawn, other)


def test_secret_bytes_key_a_stream_too() -> None:
    first, second = stream(b"one", "noise", 0).normal(size=4), stream(b"two", "noise", 0).normal(size=4)
    assert not np.array_equal(first, second)


def test_derived_seeds_depend_on_number_purpose_and_setting_alone() -> None:
    begun = [(seed, purpose, setting) for seed in range(20) for purpose in ("noise", "sampling") for setting in "abc"]
    seeds = [derived_seed(*one) for one in begun]
    assert seeds == [derived_seed(*one) for one in begun]
    assert len(set(seeds)) == len(begun)
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert max(seeds) > 2**60


@given(st.lists(st.integers(0, 300), min_size=1, max_size=6), st.integers(1, 3), st.booleans(), st.integers(0, 2000))
def test_noise_is_the_same_however_a_vector_is_cut(cuts: list[int], threads: int, wide: bool, ahead: int) -> None:
    """In parts, by threads, drawn ahead, all of it or part: bit for bit."""
    dtype: type = np.float64 if wide else np.float32
    size = sum(cuts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(randomness, "BLOCK", 64)
        patch.setattr(randomness, "PIECE", 128)
        expected = np.ones(size, dtype=dtype)
        StreamNoise(3, "noise", 4).add_normal(expected, 0.7)
        source = StreamNoise(3, "noise", 4, threads=threads)
        for _ in source.draw_ahead([(size, 0.7)], dtype, ahead):
            pass
        total, drawn, start = np.ones(size, dtype=dtype), np.empty(size, dtype=dtype), 0
        for cut in cuts:
            source.add_normal(total[start : start + cut], 0.7)
            StreamNoise(3, "noise", 4, threads=threads).fill(drawn[start : start + cut], start)
            start += cut
    np.testing.assert_array_equal(total, expected)
    np.testing.assert_array_equal(1 + dtype(0.7) * drawn, expected)


def normals(*key: int | str, size: int = 8) -> np.ndarray:
    drawn = np.empty(size, dtype=np.float32)
    StreamNoise(*key).fill(drawn)  # type: ignore[arg-type]
    return drawn


def test_another_seed_purpose_or_place_is_other_noise() -> None:
    """Whatever bit of the seed differs: keys have 128 bits, seeds have more."""
    keys: list[tuple[int | str, ...]] = [(7, "noise", 1), (7, "count", 1), (7, "noise", 2), (7, "noise", 1, 1)]
    keys += [(7 + 2**bit, "noise", 1) for bit in (0, 63, 64, 127, 128, 200, 255)]
    first = [tuple(normals(*key)) for key in keys]
    assert len(set(first)) == len(keys)
    assert first == [tuple(normals(*key)) for key in keys]
    of_stream = stream(7, "noise", 1).standard_normal(8, dtype=np.float32)
    assert not set(of_stream) & set(first[0])


def test_noise_is_what_its_definition_says() -> None:
    """Written out with the generator alone: whoever goes on with a run must draw what it drew."""
    size = 2 * randomness.BLOCK + 5
    key = hashlib.blake2b(b"7", digest_size=32).digest()
    words = hashlib.blake2b(b'["normal", "noise", 1, 2]', key=key, digest_size=32).digest()
    key, upper = (int.from_bytes(words[start : start + 16], "little") for start in (0, 16))
    blocks = [
        np.random.Generator(np.random.Philox(key=key, counter=(upper << 128) + (block << 64))) for block in range(3)
    ]
    expected = np.concatenate([one.standard_normal(randomness.BLOCK, dtype=np.float32) for one in blocks])
    np.testing.assert_array_equal(normals(7, "noise", 1, 2, size=size), expected[:size])


def test_the_upper_half_of_the_counter_is_keyed_too() -> None:
    one, other = StreamNoise(7, "noise", 1), StreamNoise(8, "noise", 1)
    other._key = one._key
    drawn = np.empty((2, 8))
    one.fill(drawn[0])
    other.fill(drawn[1])
    assert not np.array_equal(*drawn)


def test_noise_is_normal_and_independent_across_blocks() -> None:
    drawn = normals(5, "noise", size=6 * randomness.BLOCK).reshape(6, -1).astype(np.float64)
    assert stats.kstest(drawn.ravel(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(drawn) - np.eye(6)).max() < 5 / np.sqrt(randomness.BLOCK)


def test_other_laws_never_get_the_same_numbers_twice() -> None:
    source = StreamNoise(1, "noise", 2)
    first, second = (source.generator().laplace(size=100) for _ in range(2))
    assert not np.isin(first, second).any()
