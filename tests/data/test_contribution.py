from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data import contribution
from fedsim.data.contribution import bounded_rows, draw_rows
from fedsim.errors import InvalidInput

SELECTIONS = ["random", "longest", "first", "chunk"]


class View:
    """The part of a UserStore that contribution bounding reads."""

    def __init__(self, counts: list[int], lengths: list[int] | None = None):
        self.num_users = len(counts)
        self.user_offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.row_lengths = np.array(lengths if lengths is not None else [1] * sum(counts), dtype=np.int32)


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=30),
    st.integers(1, 15),
    st.integers(0, 99),
    st.sampled_from(SELECTIONS),
)
def test_bounding_keeps_as_many_as_allowed_of_every_user(counts, group_size, seed, selection) -> None:
    view = View(counts)
    rows = bounded_rows(view, group_size, seed, selection)
    assert (np.diff(rows) > 0).all()
    owners = np.searchsorted(view.user_offsets, rows, side="right") - 1
    assert np.bincount(owners, minlength=len(counts)).tolist() == [min(count, group_size) for count in counts]
    assert rows.tolist() == bounded_rows(view, group_size, seed, selection).tolist()


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 12), min_size=2, max_size=30),
    st.integers(1, 15),
    st.integers(0, 99),
    st.sampled_from(SELECTIONS),
    st.randoms(use_true_random=False),
)
def test_a_draw_does_not_depend_on_who_else_is_drawn(counts, group_size, round, selection, random) -> None:
    view = View(counts)
    cohort = np.array(random.sample(range(len(counts)), random.randint(1, len(counts))))
    rows, units = draw_rows(view, cohort, group_size, 7, round, selection)
    assert np.bincount(units, minlength=len(cohort)).tolist() == [min(counts[user], group_size) for user in cohort]
    for place, user in enumerate(cohort):
        alone, _ = draw_rows(view, np.array([user]), group_size, 7, round, selection)
        assert rows[units == place].tolist() == alone.tolist()
        assert ((alone >= view.user_offsets[user]) & (alone < view.user_offsets[user + 1])).all()
        assert (np.diff(alone) > 0).all()


def test_bounding_in_blocks_gives_the_same_rows(monkeypatch) -> None:
    view = View([3, 0, 9, 1, 40, 2, 2, 7] * 10)
    whole = {selection: bounded_rows(view, 3, 5, selection).tolist() for selection in SELECTIONS}
    monkeypatch.setattr(contribution, "ROWS_AT_ONCE", 10)
    for selection in SELECTIONS:
        assert bounded_rows(view, 3, 5, selection).tolist() == whole[selection]


def test_random_draws_are_uniform_over_subsets_and_independent_over_rounds() -> None:
    view = View([2, 5, 3])
    subsets = Counter()
    repeats = 0
    previous = None
    for round in range(6000):
        drawn = tuple(draw_rows(view, np.array([1]), 2, 0, round)[0].tolist())
        subsets[drawn] += 1
        repeats += drawn == previous
        previous = drawn
    assert len(subsets) == 10
    statistic = sum((count - 600) ** 2 / 600 for count in subsets.values())
    assert statistic < 33.7  # chi-square with 9 degrees of freedom: exceeded once in 10,000
    assert abs(repeats - 600) < 5 * np.sqrt(600 * 0.9)


def test_bounding_is_uniform_over_users_and_seeds() -> None:
    view = View([5] * 4000)
    kept = np.concatenate([bounded_rows(view, 2, seed) for seed in range(3)])
    counts = np.bincount(kept % 5)
    assert abs(counts - 4800).max() < 5 * np.sqrt(12000 * 0.4 * 0.6)


def test_chunks_are_neighbours_from_every_place() -> None:
    view = View([10])
    chunks = [draw_rows(view, np.array([0]), 4, 0, round, "chunk")[0] for round in range(3000)]
    assert all((np.diff(chunk) == 1).all() for chunk in chunks)
    starts = np.bincount([chunk[0] for chunk in chunks], minlength=7)
    assert len(starts) == 7
    assert abs(starts - 3000 / 7).max() < 5 * np.sqrt(3000 / 7)


def test_longest_and_first() -> None:
    view = View([2, 5], [9, 9, 3, 8, 3, 8, 9])
    assert bounded_rows(view, 2, 0, "longest").tolist() == [0, 1, 3, 6]
    assert bounded_rows(view, 3, 0, "longest").tolist() == [0, 1, 3, 5, 6]
    assert bounded_rows(view, 4, 0, "longest").tolist() == [0, 1, 2, 3, 5, 6]
    assert bounded_rows(view, 2, 0, "first").tolist() == [0, 1, 2, 3]


def test_bad_arguments() -> None:
    with pytest.raises(InvalidInput, match="group_size"):
        bounded_rows(View([1]), 0, 0)
    with pytest.raises(InvalidInput, match="selection"):
        draw_rows(View([1]), np.array([0]), 1, 0, 0, "best")
    with pytest.raises(IndexError):
        draw_rows(View([1]), np.array([1]), 1, 0, 0)
