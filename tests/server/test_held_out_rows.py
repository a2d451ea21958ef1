"""Which held-out rows are measured: whole users in keyed order, of many users without an order of all."""

import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy

from fedsim.randomness import stream
from server import evaluation
from server.evaluation import held_out_rows


def view_of(owned: np.ndarray) -> Any:
    offsets = np.concatenate([[0], np.cumsum(owned)])
    return SimpleNamespace(num_users=len(owned), num_rows=int(offsets[-1]), user_offsets=offsets)


@pytest.mark.parametrize("most", [1, 7, 39, 119, 120, 500])
@pytest.mark.parametrize("few", [0, 1 << 16])
def test_users_are_whole_but_for_the_last_and_each_is_there_once(
    most: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "FEW_USERS", few)
    view = view_of(np.arange(1, 16))
    rows = held_out_rows(view, most)
    assert (rows.dtype, len(rows)) == (np.int64, min(most, 120))
    assert (np.diff(rows) > 0).all()
    owners, counts = np.unique(np.searchsorted(view.user_offsets, rows, side="right") - 1, return_counts=True)
    assert (counts < owners + 1).sum() <= 1
    np.testing.assert_array_equal(rows, held_out_rows(view, most))


def test_few_users_are_measured_as_they_always_were() -> None:
    view = view_of(np.full(5000, 3))
    first = stream(0, "held-out").permutation(5000)[:20]
    expected = np.sort((first[:, None] * 3 + np.arange(3)).ravel())
    np.testing.assert_array_equal(held_out_rows(view, 60), expected)


def test_every_user_is_as_likely_to_come_first_and_pairs_are_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "FEW_USERS", 0)
    monkeypatch.setattr(evaluation, "DRAWN_AT_ONCE", 2)
    orders = np.array([list(evaluation._in_keyed_order(5, stream(seed, "test"))) for seed in range(4000)])
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(5), (4000, 1)))
    _, counts = np.unique(orders @ 5 ** np.arange(5), return_counts=True)
    assert len(counts) == 120
    assert scipy.stats.chisquare(counts).pvalue > 1e-5


def test_memory_is_that_of_what_is_drawn() -> None:
    view = view_of(np.ones(1_000_000, dtype=np.int64))
    tracemalloc.start()
    held_out_rows(view, 500)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 500_000, "an order of all takes 8 MB"
