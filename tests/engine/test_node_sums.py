"""Sums formed on Ray nodes: the same sums, each check kept, and what is lost with an actor or node asked for again."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
from mock_clients import CLIP, known_sum, make_app, request_for
from ray.cluster_utils import Cluster

from fedsim.config import EngineConfig
from fedsim.engine.exact import resolution_for
from fedsim.engine.local import LocalGrid
from fedsim.engine.messages import TrainReply, TrainRequest
from fedsim.engine.node_sums import NodeSums, StoredVector
from fedsim.engine.ray_grid import RayGrid
from fedsim.engine.summing_actor import SummingActor
from fedsim.engine.sums import ServerSum
from fedsim.engine.totals import Expected
from fedsim.errors import InvalidInput
from server.dispatch import Dispatcher, RoundFailed

UNITS = np.random.default_rng(3).permutation(500)[:60].astype(np.int64)
COSTS = np.random.default_rng(4).pareto(1.5, size=60) + 1
SIZE = 100_000
EXPECTED = Expected(size=3, units=4, bound=1.0)
ONES = np.ones(3, dtype=np.float32)


def lying_app() -> Any:
    """Worker 2's sums are what the round's number says of them."""

    def tamper(request: TrainRequest, reply: TrainReply, node: int) -> TrainReply:
        if node != 2:
            return reply
        total = reply.total.copy()
        if request.round == 1:
            total[7] = np.nan
        elif request.round == 2:
            total = total[:-1]
        elif request.round == 3:
            total = total.astype(np.float64)
        elif request.round == 4:
            total[0] = 2 * len(request.units)
        elif request.round == 5:
            return replace(reply, units=reply.units[::-1].copy())
        return replace(reply, total=total)

    return make_app(tamper)


@pytest.fixture(scope="module")
def grid(cluster: Cluster) -> Iterator[RayGrid]:
    with RayGrid(lying_app, workers=4, address=cluster.address) as made:
        yield made


def fetched(grid: RayGrid, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each large vector that comes to this process from now on."""
    seen: list[int] = []
    put = ServerSum.put

    def noted(self: ServerSum, total: np.ndarray) -> None:
        seen.append(total.nbytes)
        put(self, total)

    monkeypatch.setattr(ServerSum, "put", noted)
    return seen


@pytest.mark.parametrize("units_per_message", [None, 7])
def test_one_sum_a_node_comes_to_the_server(
    grid: RayGrid, units_per_message: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = fetched(grid, monkeypatch)
    dispatcher = Dispatcher(grid, units_per_message=units_per_message, sums="nodes")
    for size in (SIZE, SIZE, 2 * SIZE):  # the buffer is kept, and made anew for another size
        seen.clear()
        gathered = dispatcher.gather(request_for(UNITS, size=size), COSTS)
        assert np.array_equal(gathered.total, known_sum(UNITS, 0, size))
        assert gathered.total.flags.writeable
        assert gathered.units == gathered.statistics["rows"] == len(UNITS)
        assert not gathered.failures
        assert seen == [4 * size] * 2


def test_small_sums_come_inside_their_messages(grid: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fetched(grid, monkeypatch)
    gathered = Dispatcher(grid, sums="nodes").gather(request_for(UNITS, size=40), COSTS)
    assert np.array_equal(gathered.total, known_sum(UNITS, 0, 40))
    assert seen == [160] * 4


def test_exact_sums_are_the_same_bits(grid: RayGrid) -> None:
    request = request_for(UNITS, size=SIZE, resolution=resolution_for(CLIP, 500))
    on_nodes = Dispatcher(grid, sums="nodes").gather(request, COSTS)
    at_server = Dispatcher(grid, sums="server").gather(request, COSTS)
    assert on_nodes.total.dtype == np.int64
    assert np.array_equal(on_nodes.total, at_server.total)


@pytest.mark.parametrize(
    ("round", "reason"),
    [(1, "not finite"), (2, r"float32\[99999\]"), (3, "float64"), (4, "has norm"), (5, "units that are not")],
)
def test_a_bad_sum_is_refused_where_it_lies_and_its_worker_left_out(grid: RayGrid, round: int, reason: str) -> None:
    gathered = Dispatcher(grid, sums="nodes").gather(request_for(UNITS, round=round, size=SIZE), COSTS)
    assert np.array_equal(gathered.total, known_sum(UNITS, round, SIZE))
    assert gathered.statistics["rows"] == len(UNITS)
    (failure,) = gathered.failures
    assert "worker 2 failed" in failure
    assert "its reply was refused: it" in failure
    assert re.search(reason, failure)


class NoNumber(SummingActor):
    """Gives sums that are none."""

    def give(self, gathering: int) -> tuple[list[str], Any]:
        keys, total = super().give(gathering)
        return keys, total * np.float32(np.nan)


def test_a_nodes_sum_is_held_to_what_its_parts_can_be(grid: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    actors = grid._transport._summing
    actors.close()
    with monkeypatch.context() as patch:
        patch.setattr("fedsim.engine.node_sums.SummingActor", NoNumber)
        with pytest.raises(RoundFailed, match="not finite"):
            Dispatcher(grid, sums="nodes").gather(request_for(UNITS, size=SIZE), COSTS)
        actors.close()


def test_what_an_actor_held_when_it_died_is_asked_for_again(grid: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one node; the other node's sum stands."""
    settle, killed = NodeSums.settle, []

    def after_a_death(self: NodeSums) -> Any:
        if not killed:
            node = next(iter(self._handed))
            killed.append(len(self._handed[node].verdicts))
            ray.get(list(self._handed[node].verdicts.values()))
            ray.kill(self._actors.on(node))
        return settle(self)

    monkeypatch.setattr(NodeSums, "settle", after_a_death)
    gathered = Dispatcher(grid, sums="nodes").gather(request_for(UNITS, size=SIZE), COSTS)
    assert np.array_equal(gathered.total, known_sum(UNITS, 0, SIZE))
    assert gathered.statistics["rows"] == len(UNITS)
    assert len(gathered.failures) == killed[0] == 2
    assert all("the sum of its node was lost" in failure for failure in gathered.failures)
    assert not Dispatcher(grid, sums="nodes").gather(request_for(UNITS, size=SIZE), COSTS).failures


def test_an_actor_that_hangs_is_given_up_with_what_it_held(grid: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    settle, hung = NodeSums.settle, []

    def after_a_hang(self: NodeSums) -> Any:
        self._patience = 60.0
        if not hung:
            hung.append(node := next(iter(self._handed)))
            self._actors.on(node).__ray_call__.remote(lambda _: time.sleep(3600))
            self._patience = 1.0
        return settle(self)

    monkeypatch.setattr(NodeSums, "settle", after_a_hang)
    gathered = Dispatcher(grid, sums="nodes").gather(request_for(UNITS, size=SIZE), COSTS)
    assert np.array_equal(gathered.total, known_sum(UNITS, 0, SIZE))
    assert "Timeout" in gathered.failures[0]


def test_an_actor_that_names_other_parts_is_not_believed(grid: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever got into its sum, or was left out of it, nothing of it counts."""
    settle, told = NodeSums.settle, []

    def after_a_stranger(self: NodeSums) -> Any:
        if not told:
            told.append(node := next(iter(self._handed)))
            one = Expected(size=SIZE, units=1, bound=1.0)
            ray.get(self._actors.on(node).add.remote(self._gathering, "a stranger's", one, np.zeros(SIZE, np.float32)))
        return settle(self)

    monkeypatch.setattr(NodeSums, "settle", after_a_stranger)
    gathered = Dispatcher(grid, sums="nodes").gather(request_for(UNITS, size=SIZE), COSTS)
    assert np.array_equal(gathered.total, known_sum(UNITS, 0, SIZE))
    assert "other parts than it was given" in gathered.failures[0]


def test_sums_that_are_lost_again_and_again_fail_the_round(grid: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    settle = NodeSums.settle

    def dead(self: NodeSums) -> Any:
        for node in self._handed:
            ray.kill(self._actors.on(node))
        return settle(self)

    monkeypatch.setattr(NodeSums, "settle", dead)
    with pytest.raises(RoundFailed, match=r"the sum of its node was lost.*attempt 2 of 2"):
        Dispatcher(grid, sums="nodes", attempts=2).gather(request_for(UNITS, size=SIZE), COSTS)


def test_a_node_that_dies_with_its_sum_loses_only_that(cluster: Cluster, grid: RayGrid) -> None:
    node = cluster.add_node(num_cpus=2, object_store_memory=100 << 20, resources={"doomed": 1})
    cluster.wait_for_nodes()
    (doomed,) = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("doomed")]
    settle, lost = NodeSums.settle, []

    def after_a_death(self: NodeSums) -> Any:
        if doomed in self._handed and not lost:
            lost.append(len(self._handed[doomed].verdicts))
            ray.get(list(self._handed[doomed].verdicts.values()))  # all of it is in the sum there
            cluster.remove_node(node, allow_graceful=False)
        return settle(self)

    with pytest.MonkeyPatch.context() as patch, RayGrid(lying_app, workers=6, address=cluster.address) as three:
        patch.setattr(NodeSums, "settle", after_a_death)
        gathered = Dispatcher(three, sums="nodes").gather(request_for(UNITS, size=SIZE), COSTS)
        assert np.array_equal(gathered.total, known_sum(UNITS, 0, SIZE))
        assert gathered.statistics["rows"] == len(UNITS)
        assert len(gathered.failures) >= lost[0] > 0  # units may be asked of a worker that is gone, too
    deadline = time.monotonic() + 120
    while sum(n["Alive"] for n in ray.nodes()) > 2:  # or Ray would offer its cores to the tests that follow
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_part_is_freed_as_soon_as_it_is_added(grid: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the round goes on, nobody holds a reference to it; but the only part of a node is the node's sum."""
    add, settle = NodeSums.add, NodeSums.settle
    references: dict[str, list[bytes]] = {}

    def noted(self: NodeSums, key: str, total: StoredVector, expected: Expected) -> None:
        references.setdefault(total.node, []).append(total.reference.hex().encode())
        add(self, key, total, expected)

    def held() -> set[bytes]:
        added = {part for parts in references.values() if len(parts) > 1 for part in parts}
        return added & ray._private.worker.global_worker.core_worker.get_all_reference_counts().keys()

    def after_the_last(self: NodeSums) -> Any:
        for handed in self._handed.values():
            ray.get(list(handed.verdicts.values()))
        deadline = time.monotonic() + 10
        while len(held()) > len(self._handed):  # Ray keeps what an actor's last call was given until its next
            assert time.monotonic() < deadline, f"{len(held())} parts are held"
            time.sleep(0.05)
        return settle(self)

    monkeypatch.setattr(NodeSums, "add", noted)
    monkeypatch.setattr(NodeSums, "settle", after_the_last)
    Dispatcher(grid, sums="nodes", units_per_message=5).gather(request_for(UNITS, size=SIZE), COSTS)
    assert min(len(parts) for parts in references.values()) > 1


# The actor, in this process ----------------------------------------------------------------------------------------


def test_an_actor_adds_each_key_once_and_nothing_that_is_late() -> None:
    actor = SummingActor([])
    assert actor.add(3, "a", EXPECTED, ONES) == ""
    assert "twice" in actor.add(3, "a", EXPECTED, ONES)
    assert "late" in actor.add(2, "b", EXPECTED, ONES)
    assert "norm" in actor.add(3, "c", EXPECTED, 9 * ONES)
    assert actor.add(3, "d", EXPECTED, ONES) == ""
    keys, total = actor.give(3)
    assert keys == ["a", "d"]
    assert total is not None
    assert total.tolist() == [2, 2, 2]
    assert ONES.tolist() == [1, 1, 1]  # parts are read, not written to
    assert actor.give(3) == ([], None)
    assert "late" in actor.add(3, "e", EXPECTED, ONES)


def test_an_actor_forgets_a_gathering_that_nobody_asked_for() -> None:
    actor = SummingActor([])
    actor.add(0, "a", EXPECTED, ONES)
    actor.add(0, "b", EXPECTED, ONES)
    actor.add(1, "c", EXPECTED, ONES)
    keys, total = actor.give(1)
    assert keys == ["c"]
    assert total is not None
    assert total.tolist() == [1, 1, 1]


# Which form --------------------------------------------------------------------------------------------------------


def test_auto_takes_nodes_for_large_sums_of_several_workers_on_several_nodes(grid: RayGrid) -> None:
    assert isinstance(grid.sums("auto", 64 << 20, 1.0), NodeSums)
    assert isinstance(grid.sums("auto", 1 << 10, 1.0), ServerSum)
    assert isinstance(grid.sums("server", 64 << 20, 1.0), ServerSum)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "_slots", dict(list(grid._slots.items())[:2]))  # a worker a node: nothing to add there
        assert isinstance(grid.sums("auto", 64 << 20, 1.0), ServerSum)


def test_grids_without_nodes_keep_the_servers_form_and_refuse_the_other() -> None:
    assert isinstance(LocalGrid(make_app()).sums("auto", 1 << 30, 1.0), ServerSum)
    with pytest.raises(InvalidInput, match=r"engine\.sums"):
        Dispatcher(LocalGrid(make_app()), sums="nodes")
    with pytest.raises(InvalidInput, match=r"engine\.sums"):
        EngineConfig(kind="local", sums="nodes")
