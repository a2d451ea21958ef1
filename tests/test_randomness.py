"""Keyed streams: the same arguments draw the same numbers, any other argument draws others."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedsim.randomness import derived_seed, stream

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
