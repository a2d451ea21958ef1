"""Examples drawn among slots of which some are empty: the same rows, the same law, and no list of them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data import contribution
from fedsim.data.contribution import bounded_rows, bounded_rows_of
from fedsim.plan import ElsPlan, UserSizes, plan_from_values
from fedsim.rows import SizeCounts
from fedsim.sampling import (
    SAMPLINGS,
    CyclicPoisson,
    Poisson,
    Population,
    RandomAllocation,
    Sampling,
    Streams,
    TruncatedPoisson,
    Turns,
)

OWNED = (1, 2, 5, 3, 7, 1, 4, 2)
GROUP = 3


class Users:
    """Users that own so many rows; a row's length tells apart rows of a user.

    Args:
        owned: Rows of each.
    """

    def __init__(self, *owned: int) -> None:
        self.user_offsets = np.concatenate([[0], np.cumsum(owned)]).astype(np.int64)
        self.row_lengths = 1 + np.arange(self.num_rows) % 5

    @property
    def num_users(self) -> int:
        return len(self.user_offsets) - 1

    @property
    def num_rows(self) -> int:
        return int(self.user_offsets[-1])

    def take(self, row_indices: np.ndarray, /) -> Any:
        raise NotImplementedError


def els(users: Users, **changes: Any) -> ElsPlan:
    fields: dict[str, Any] = {
        "num_examples": 1,
        "group_size": GROUP,
        "sampling_probability": 0.25,
        "clip_norm": 1.0,
        "noise_multiplier": 1.0,
        "steps": 10,
        "delta": 1e-5,
        "by_slots": True,
    }
    return ElsPlan(**{**fields, **changes}).on(users)


def rounds_of(plan: ElsPlan, users: Users, rounds: int, seed: int = 1) -> np.ndarray:
    """Which rows took part in which round, bool [rounds, rows]."""
    population, unit_ids = plan.population_of(users, seed), plan.unit_ids(users, seed)
    joined = np.zeros((rounds, users.num_rows), dtype=bool)
    for number in range(rounds):
        units = unit_ids(plan.sample(number, seed, population=population))
        assert (np.diff(units) > 0).all(), "each at most once, in order"
        joined[number, units] = True
    return joined


SELECTIONS = ("random", "longest", "first", "chunk")


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=30),
    st.integers(1, 5),
    st.integers(0, 2**62),
    st.sampled_from(SELECTIONS),
    st.data(),
)
def test_slots_hold_the_rows_that_are_kept_each_once_whoever_is_asked_for(
    owned: list[int], group: int, seed: int, selection: Any, data: st.DataObject
) -> None:
    users = Users(*owned)
    plan = els(users, group_size=group, selection=selection)
    kept = bounded_rows(users, group, seed, selection)
    all_slots = np.arange(users.num_users * group)
    np.testing.assert_array_equal(plan._rows_in(all_slots, users, seed), kept)
    some = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=len(all_slots), max_size=len(all_slots))))
    alone = [plan._rows_in(np.array([slot]), users, seed) for slot in some]
    np.testing.assert_array_equal(plan._rows_in(some, users, seed), np.concatenate([*alone, np.empty(0, np.int64)]))
    asked = np.arange(users.num_users)[:: data.draw(st.integers(1, 3))]
    rows, places = bounded_rows_of(users, asked, group, seed, selection)
    owners = np.searchsorted(users.user_offsets, kept, side="right") - 1
    np.testing.assert_array_equal(rows, kept[np.isin(owners, asked)])
    np.testing.assert_array_equal(asked[places], owners[np.isin(owners, asked)])


def test_ties_of_the_bits_that_are_sorted_do_not_change_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few bits are left beside many owners; who is asked for with others must keep what it keeps alone."""
    users = Users(*[6] * 50)

    def coarse(values: np.ndarray) -> np.ndarray:
        return mix(values) >> np.uint64(58)  # random bits in the lowest six alone, which the owners push out

    mix = contribution._mix
    monkeypatch.setattr(contribution, "_mix", coarse)
    together, places = bounded_rows_of(users, np.arange(50), 2, 0)
    for user in range(50):
        alone, _ = bounded_rows_of(users, np.array([user]), 2, 0)
        np.testing.assert_array_equal(alone, together[places == user])


def test_every_kept_row_joins_with_the_probability_and_by_itself_and_no_other_row_does() -> None:
    users, rounds = Users(*OWNED), 3000
    plan = els(users)
    kept = bounded_rows(users, GROUP, 1)
    assert plan.num_examples == len(kept) == sum(min(owned, GROUP) for owned in OWNED)
    joined = rounds_of(plan, users, rounds)
    counts = joined.sum(axis=0)
    np.testing.assert_array_equal(np.flatnonzero(counts), kept)
    assert_chance(
        scipy.stats.chisquare(
            [counts[kept].sum(), rounds * len(kept) - counts[kept].sum()],
            [rounds * len(kept) * 0.25, rounds * len(kept) * 0.75],
        ).pvalue
    )
    spread = ((counts[kept] - rounds * 0.25) ** 2 / (rounds * 0.25 * 0.75)).sum()
    assert_chance(scipy.stats.chi2.sf(spread, len(kept)))
    # How many join is binomial, and how many of one user's, as the accountant has it.
    assert_binomial(joined.sum(axis=1), len(kept))
    of_one = joined[:, users.user_offsets[4] : users.user_offsets[5]].sum(axis=1)
    assert_binomial(of_one, GROUP)
    assert_binomial(joined[:, users.user_offsets[1] : users.user_offsets[2]].sum(axis=1), 2)
    # Two join together as often as chance.
    pairs = (joined[:, kept].T.astype(float) @ joined[:, kept])[np.triu_indices(len(kept), 1)]
    assert np.abs(pairs - rounds / 16).max() < 6 * np.sqrt(rounds / 16 * 15 / 16)


def assert_chance(pvalue: float) -> None:
    assert pvalue > 1e-5


def assert_binomial(found: np.ndarray, trials: int) -> None:
    """Counts of rounds against Bin(trials, 1/4), in cells that are expected at least five times."""
    law = scipy.stats.binom(trials, 0.25).pmf(np.arange(trials + 1)) * len(found)
    seen = np.bincount(found, minlength=trials + 1)
    large = law >= 5
    law, seen = np.append(law[large], law[~large].sum()), np.append(seen[large], seen[~large].sum())
    some = law > 0
    assert_chance(scipy.stats.chisquare(seen[some], law[some]).pvalue)


def test_the_law_is_that_of_the_list() -> None:
    users, rounds = Users(*OWNED), 2000
    by_slots, listed = (rounds_of(els(users, by_slots=slots), users, rounds) for slots in (True, False))
    assert not np.array_equal(by_slots, listed)
    kept = bounded_rows(users, GROUP, 1)
    table = np.array([by_slots.sum(axis=0)[kept], listed.sum(axis=0)[kept]])
    assert_chance(scipy.stats.chi2_contingency(table).pvalue)
    most = sum(OWNED)
    sizes = np.array([np.bincount(joined.sum(axis=1), minlength=most) for joined in (by_slots, listed)])
    assert_chance(scipy.stats.chi2_contingency(sizes[:, sizes.min(axis=0) >= 5]).pvalue)


def test_groups_are_of_users_and_never_of_slots() -> None:
    users = Users(*[1, 5, 3, 4] * 10)
    plan = els(users, sampling=CyclicPoisson(groups=3))
    population = plan.population_of(users, 1)
    assert population.size == users.num_users * GROUP
    np.testing.assert_array_equal(population.users_of(np.arange(population.size)), np.repeat(np.arange(40), GROUP))
    joined = rounds_of(plan, users, 600)
    rounds, rows = np.nonzero(joined)
    owners = np.searchsorted(users.user_offsets, rows, side="right") - 1
    turns = [set(rounds[owners == user] % 3) for user in range(users.num_users)]
    assert all(len(turn) == 1 for turn in turns)
    assert len({turn for of_user in turns for turn in of_user}) == 3
    kept = bounded_rows(users, GROUP, 1)
    np.testing.assert_array_equal(np.flatnonzero(joined.any(axis=0)), kept)
    # In its turn each joins with three times the probability, by itself.
    assert_chance(scipy.stats.binomtest(int(joined.sum()), 200 * len(kept), 0.75).pvalue)
    # The groups are those of the same users where their examples are listed.
    listed = rounds_of(dataclasses.replace(plan, by_slots=False), users, 30)
    rounds, rows = np.nonzero(listed)
    owners = np.searchsorted(users.user_offsets, rows, side="right") - 1
    assert all(turns[owner] == {number % 3} for owner, number in zip(owners, rounds, strict=True))


@dataclass(frozen=True, kw_only=True)
class OfFixedSize(Poisson):
    """Draws in a way of its own, and says nothing of it."""

    def draw(self, population: Population, probability: float, round: int, streams: Streams) -> np.ndarray:
        size = max(1, int(probability * population.size))
        return np.sort(streams(round).choice(population.size, size=size, replace=False))


@dataclass(frozen=True, kw_only=True)
class Renamed(Poisson):
    """Draws as its parent does."""


def test_a_scheme_that_does_not_say_so_is_never_given_empty_places() -> None:
    schemes: dict[type[Sampling], bool] = {
        Poisson: True,
        CyclicPoisson: True,
        Renamed: True,
        OfFixedSize: False,
        Turns: False,
        TruncatedPoisson: False,
        RandomAllocation: False,
    }
    assert {kind for _, kind in SAMPLINGS.items()} <= set(schemes), "whoever adds a scheme says here which it is"
    assert {kind: kind.permits_empty_places() for kind in schemes} == schemes
    users = Users(*OWNED)
    plan = els(users, sampling=OfFixedSize())
    assert plan.population_of(users, 1).size == plan.num_examples == 18
    assert (rounds_of(plan, users, 20).sum(axis=1) == 4).all()


def test_slots_are_drawn_from_where_they_are_worth_it() -> None:
    mostly_empty = Users(*[1] * 40, 500)
    plan = els(mostly_empty, group_size=400)
    assert plan.population_of(mostly_empty, 1).size == plan.num_examples
    everything_kept = Users(3, 1, 2)
    plan = els(everything_kept)
    assert plan.population_of(everything_kept, 1).size == plan.num_examples == everything_kept.num_rows
    np.testing.assert_array_equal(plan.unit_ids(everything_kept, 1)(np.arange(6)), np.arange(6))


def listed_before(users: Users, plan: ElsPlan, seed: int) -> Callable[[int], np.ndarray]:
    """The units of a round as they were before there were slots."""
    rows = bounded_rows(users, plan.group_size, seed)
    population = Population.of_users(len(rows))
    return lambda number: rows[Poisson().draw(population, plan.sampling_probability, number, Streams(seed, "batch"))]


@pytest.mark.parametrize("owned", [OWNED, (3, 1, 2, 3)])
def test_a_run_begun_before_there_were_slots_goes_on_with_its_samples(owned: tuple[int, ...]) -> None:
    users = Users(*owned)
    written = els(users, by_slots=False).to_values()
    assert "by_slots" not in written, "as such a run wrote it"
    plan = plan_from_values(written)
    assert isinstance(plan, ElsPlan)
    assert plan.to_values() == written
    before, population, unit_ids = listed_before(users, plan, 1), plan.population_of(users, 1), plan.unit_ids(users, 1)
    for number in range(5):
        units = unit_ids(plan.sample(number, 1, population=population))
        np.testing.assert_array_equal(units, before(number))
    assert plan_from_values(els(users).to_values()) == els(users)


def test_drafts_draw_by_slots() -> None:
    common: dict[str, Any] = {"clip_norm": 1.0, "noise_multiplier": 1.0, "steps": 3, "delta": 1e-5}
    sizes = UserSizes.of_users(Users(*OWNED))
    assert ElsPlan.draft(sizes, gradients_per_round=4, group_size=GROUP, **common).by_slots
    assert sizes.kept(GROUP) == SizeCounts.of(Users(*OWNED)).kept(GROUP) == 18
