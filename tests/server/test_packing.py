"""Packing units onto workers."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from server.packing import Speeds, chunks, pack

costs_of_units = st.lists(st.floats(0, 1e6), max_size=60).map(np.array)


@given(costs=costs_of_units, speeds=st.lists(st.floats(0.1, 10), min_size=1, max_size=7).map(np.array))
def test_every_unit_once_and_in_order(costs: np.ndarray, speeds: np.ndarray) -> None:
    parts = pack(costs, speeds)
    assert len(parts) == len(speeds)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(costs)))
    assert all((np.diff(part) > 0).all() for part in parts)


@given(costs=costs_of_units, workers=st.integers(1, 7))
def test_finishing_time_is_near_the_least_possible(costs: np.ndarray, workers: int) -> None:
    finish = max(costs[part].sum() for part in pack(costs, np.ones(workers)))
    # Any greedy schedule ends within one job of the average load.
    assert finish <= costs.sum() / workers + costs.max(initial=0) * (1 - 1 / workers) + 1e-6


def test_a_busy_worker_gets_less() -> None:
    parts = pack(np.ones(10), np.ones(2), busy_until=np.array([4.0, 0.0]))
    assert [len(part) for part in parts] == [3, 7]


def test_chunks_are_no_larger_than_asked_and_lose_nothing() -> None:
    positions = np.arange(10)
    assert [part.tolist() for part in chunks(positions, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(chunks(positions, None)) == 1
    assert chunks(positions[:0], None) == []


def test_speeds_are_learned_and_strangers_count_as_average() -> None:
    speeds = Speeds()
    assert speeds.of([1, 2]).tolist() == [1.0, 1.0]
    speeds.learn(1, cost=10, seconds=20)
    speeds.learn(2, cost=10, seconds=40)
    assert speeds.of([1, 2, 3]).tolist() == [2.0, 4.0, 3.0]
    speeds.learn(1, cost=0, seconds=1)
    speeds.learn(1, cost=1, seconds=0)
    assert speeds.of([1]).tolist() == [2.0]
    for _ in range(40):
        speeds.learn(1, cost=10, seconds=50)
    assert abs(speeds.of([1])[0] - 5) < 0.01
