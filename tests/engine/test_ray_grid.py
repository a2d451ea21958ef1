"""RayGrid on a cluster of two nodes: sums, what crosses how, errors, refusals."""

import re
from collections.abc import Iterator

import numpy as np
import pytest
import ray
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from mock_clients import known_sum, make_app, request_for
from ray.cluster_utils import Cluster

from fedsim.engine import ray_grid
from fedsim.engine.arrays import HeldArray, LentArray
from fedsim.engine.cluster import room_for
from fedsim.engine.local import LocalGrid
from fedsim.engine.messages import TRAIN, parameters_record
from fedsim.engine.ray_grid import RayGrid, WorkersDidNotStart
from fedsim.engine.same_versions import VersionsDiffer
from fedsim.errors import InvalidInput
from server.dispatch import Dispatcher

UNITS = np.random.default_rng(3).permutation(500)[:101].astype(np.int64)
COSTS = np.random.default_rng(4).pareto(1.5, size=101) + 1


def inspecting_app() -> ClientApp:
    """Made in the worker: reports what it sees there."""
    made = ClientApp()

    @made.query("look")
    def look(message: Message, context: Context) -> Message:
        import os

        array = message.content.array_records["parameters"]["flat"]
        values = array.__dict__["_held"]
        seen = {
            "node": ray.get_runtime_context().get_node_id(),
            "ours": type(array) is HeldArray,
            "first": float(values[0]),
            "owns": bool(values.flags.owndata),
            "writeable": bool(values.flags.writeable),
            "threads": os.environ["OMP_NUM_THREADS"],
            "partition": context.node_config["partition-id"],
            "config": context.run_config["answer"],
        }
        record = request_for(UNITS).to_record()
        from flwr.app import ConfigRecord

        record["seen"] = ConfigRecord(seen)
        return Message(record, reply_to=message)

    train = make_app()

    @made.train()
    def forward(message: Message, context: Context) -> Message:
        return train(message, context)

    return made


@pytest.fixture(scope="module")
def grid(cluster: Cluster) -> Iterator[RayGrid]:
    with RayGrid(inspecting_app, {"answer": 42}, workers=4, cpus_per_worker=2, address=cluster.address) as made:
        yield made


@pytest.fixture(params=["segments", "object store"])
def way(grid: RayGrid, request: pytest.FixtureRequest) -> Iterator[str]:
    """Workers that this process's segments reach, and the same as if they were on another machine."""
    grid.send_and_receive([Message(RecordDict(), node, TRAIN) for node in grid.get_node_ids()])
    assert all(slot.near for slot in grid._slots.values())
    for slot in grid._slots.values():
        slot.near = request.param == "segments"
    yield request.param
    for slot in grid._slots.values():
        slot.near = True


def looks(grid: RayGrid, size: int = 100_000) -> list[Message]:
    content = request_for(UNITS, size=size).to_record()
    return list(grid.send_and_receive([Message(content, node, "query.look") for node in grid.get_node_ids()]))


def test_actors_land_on_every_node(grid: RayGrid) -> None:
    nodes = [str(reply.content.config_records["seen"]["node"]) for reply in looks(grid)]
    assert sorted(nodes.count(node) for node in set(nodes)) == [2, 2]


def test_what_a_client_sees(grid: RayGrid, way: str) -> None:
    seen = [dict(reply.content.config_records["seen"]) for reply in looks(grid)]
    assert {s["partition"] for s in seen} == {0, 1, 2, 3}
    for s in seen:
        # Ours, not turned into bytes; a read-only view of shared memory, not a copy.
        assert s["ours"]
        assert not s["owns"]
        assert not s["writeable"]
        assert s["threads"] == "2"
        assert s["config"] == 42


def test_replies_are_read_from_shared_memory(grid: RayGrid) -> None:
    content = request_for(UNITS, size=500_000).to_record()
    (reply,) = grid.send_and_receive([Message(content, 1, TRAIN)])
    total = reply.content.array_records["total"]["flat"]
    assert type(total) is HeldArray
    assert not total.__dict__["_held"].flags.owndata


def test_a_broadcast_is_stored_once_a_round_and_freed_with_its_record(grid: RayGrid, way: str) -> None:
    stored = grid._transport._broadcasts._stored
    stored.clear()
    request = request_for(UNITS, size=100_000)
    for _ in range(3):
        Dispatcher(grid, units_per_message=9).gather(request, COSTS)
        assert len(stored) == 1
    (_, _, reference) = next(iter(stored.values()))
    Dispatcher(grid).gather(request_for(UNITS, round=1, size=100_000), COSTS)
    del request
    assert reference not in [entry[2] for entry in stored.values()]


def test_a_record_that_changes_between_rounds_is_sent_again(grid: RayGrid, way: str) -> None:
    request = request_for(UNITS, size=100_000)
    for round, value in enumerate([1.0, 2.0]):
        request.shared["flat"] = LentArray(np.full(100_000, value, dtype=np.float32))
        message = Message(request.to_record(), 1, "query.look", group_id=str(round))
        (reply,) = grid.send_and_receive([message])
        assert reply.content.config_records["seen"]["first"] == value


def test_writing_to_what_was_sent_does_not_reach_the_workers(grid: RayGrid, way: str) -> None:
    flat = np.ones(100_000, dtype=np.float32)
    record = request_for(UNITS).to_record()
    record["parameters"] = parameters_record(flat)
    messages = [Message(record, node, "query.look", group_id="7") for node in (1, 2)]
    grid.send_and_receive(messages[:1])
    flat[:] = 5
    (reply,) = grid.send_and_receive(messages[1:])
    assert reply.content.config_records["seen"]["first"] == 1


@pytest.mark.parametrize("units_per_message", [None, 1])
@pytest.mark.parametrize("size", [40, 100_000])
def test_sums_equal_those_of_one_process(grid: RayGrid, way: str, units_per_message: int | None, size: int) -> None:
    request = request_for(UNITS, round=3, size=size)
    gathered = Dispatcher(grid, units_per_message=units_per_message).gather(request, COSTS)
    alone = Dispatcher(LocalGrid(make_app())).gather(request, COSTS)
    assert np.array_equal(gathered.total, alone.total)
    assert np.array_equal(gathered.total, known_sum(UNITS, 3, size))
    assert gathered.total.flags.writeable
    assert gathered.messages == (4 if units_per_message is None else len(UNITS))


def test_an_exception_comes_back_as_flowers_error(grid: RayGrid) -> None:
    replies = grid.send_and_receive([Message(RecordDict(), 1, TRAIN)])
    assert replies[0].has_error()
    assert "KeyError" in (replies[0].error.reason or "")
    assert replies[0].metadata.src_node_id == 1


def test_send_and_receive_gives_up_in_time_and_pull_does_not_block(grid: RayGrid) -> None:
    assert grid.send_and_receive([], timeout=1.0) == []
    ids = grid.push_messages([Message(request_for(UNITS).to_record(), 1, TRAIN)])
    assert len(grid.send_and_receive([Message(request_for(UNITS).to_record(), 2, TRAIN)], timeout=30)) == 1
    assert len(grid.wait(ids)) == 1
    assert grid.pull_messages(ids) == []


def test_a_client_that_cannot_be_imported_is_named_at_once(cluster: Cluster, grid: RayGrid) -> None:
    with pytest.raises(WorkersDidNotStart, match="no_such_module"):
        RayGrid("no_such_module:app", workers=1, cpus_per_worker=0)


def slow_app() -> ClientApp:
    import time

    time.sleep(3600)
    raise AssertionError


def test_workers_that_take_too_long_to_start_are_a_sentence(cluster: Cluster, grid: RayGrid) -> None:
    with pytest.raises(WorkersDidNotStart, match=r"2 of 2 workers not ready in 1\.5 s\..*--engine\.start-seconds"):
        RayGrid(slow_app, workers=2, cpus_per_worker=0, start_timeout=1.5)


def test_versions_that_differ_are_refused_with_both_named(grid: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    there = ray_grid.versions()
    monkeypatch.setattr(ray_grid, "versions", lambda: {**there, "torch": "1.0.0", "platform": "elsewhere"})
    with pytest.raises(
        VersionsDiffer, match=rf"torch is 1.0.0 on the driver and {re.escape(there['torch'])} on worker 1"
    ):
        RayGrid("mock_clients:app", workers=1, cpus_per_worker=0)


def test_more_workers_than_there_is_room_for_are_refused(grid: RayGrid) -> None:
    with pytest.raises(InvalidInput, match=r"at most 8.*room for 8 workers of 1 CPU"):
        RayGrid("mock_clients:app", workers=9)
    with pytest.raises(InvalidInput, match="at most 0"):
        RayGrid("mock_clients:app", workers=1, gpus_per_worker=0.5)


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "fits"),
    [
        ([{"CPU": 8.0}], 1, 0, 8),
        ([{"CPU": 8.0}, {"CPU": 3.0}], 2, 0, 5),
        ([{"CPU": 0.3}], 0.1, 0, 3),
        ([{"CPU": 64.0, "GPU": 2.0}], 1, 0.25, 8),
        ([{"CPU": 64.0, "GPU": 2.0}], 1, 0.6, 2),
        ([{"CPU": 64.0, "GPU": 8.0}], 1, 2, 4),
        ([{"CPU": 3.0, "GPU": 8.0}], 1, 0.5, 3),
        ([{"CPU": 3.0}], 1, 0.5, 0),
    ],
)
def test_room(nodes: list[dict[str, float]], cpus: float, gpus: float, fits: int) -> None:
    assert room_for(nodes, cpus, gpus) == fits
