"""Shared memory that is kept: lent again once nobody reads it, out of reach where it is another's, never mixed up."""

import errno
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from mock_clients import known_sum, make_app, request_for
from ray.cluster_utils import Cluster

from fedsim.engine.messages import TRAIN, TrainReply, TrainRequest
from fedsim.engine.ray_grid import RayGrid
from fedsim.engine.segments import Mapped, Segments
from server.dispatch import Dispatcher

UNITS = np.random.default_rng(3).permutation(500)[:60].astype(np.int64)
COSTS = np.ones(60)
SIZE = 100_000


def test_a_segment_is_lent_again_once_its_array_and_all_views_are_gone() -> None:
    segments = Segments()
    lent, place = segments.lend((10, 10), np.float32)
    part = lent[3:, 2][1:]
    assert segments.lend((10, 10), np.float32)[1] != place
    del lent
    assert segments.lend((10, 10), np.float32)[1] != place
    del part
    gc.collect()
    again = [segments.lend((10, 10), np.float32) for _ in range(2)]
    assert place in [one[1] for one in again]


def test_one_that_somebody_may_still_write_to_is_never_lent_again() -> None:
    segments = Segments()
    lent, place = segments.lend((10,), np.float32)
    segments.retire(place)
    del lent
    assert segments.lend((10,), np.float32)[1] != place


def test_another_process_reads_and_writes_it_and_nothing_is_left_of_it() -> None:
    lent, place = Segments().lend((5,), np.float64)
    lent[:] = np.arange(5)
    before = set(os.listdir("/dev/shm"))
    code = (
        "from fedsim.engine.segments import *\n"
        f"values = Mapped().values({place!r}, (5,), 'float64', write=True)\n"
        "assert values.tolist() == [0, 1, 2, 3, 4]\n"
        "values += 1\n"
        f"read = Mapped().values({place!r}, (5,), 'float64')\n"
        "assert not read.flags.writeable\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert lent.tolist() == [1, 2, 3, 4, 5]
    assert set(os.listdir("/dev/shm")) - before == set()


def test_a_place_that_is_anothers_is_out_of_reach() -> None:
    """On another machine a process of the same number may have a file of the same number open."""
    lent, place = Segments().lend((5,), np.float64)
    mapped = Mapped()
    mapped.values(place, (5,), "float64")
    with pytest.raises(ValueError, match="another"):
        mapped.values(replace(place, token=b"x" * 16), (5,), "float64")
    with pytest.raises(OSError, match="No such file"):
        mapped.values(replace(place, path=f"/proc/{os.getpid()}/fd/99999", token=b"y" * 16), (5,), "float64")
    del lent


# Rounds over them --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grid(cluster: Cluster) -> Iterator[RayGrid]:
    with RayGrid("mock_clients:app", {}, workers=2, address=cluster.address) as made:
        yield made


def test_a_round_leaves_no_segment_taken_and_the_next_makes_none(grid: RayGrid) -> None:
    dispatcher = Dispatcher(grid)
    free = grid._transport._segments._free
    for round in range(4):
        gathered = dispatcher.gather(request_for(UNITS, round=round, size=SIZE), COSTS)
        assert np.array_equal(gathered.total, known_sum(UNITS, round, SIZE))
        del gathered
        gc.collect()
        if round == 0:
            made = {segment.place for segment in free}
    assert {segment.place for segment in free} == made
    assert len(made) == 4  # parameters, two sums, and the one by which workers were asked whether they see any


def test_a_sum_stays_as_it_is_while_later_rounds_run(grid: RayGrid) -> None:
    """The server may keep one for as long as it likes."""
    dispatcher = Dispatcher(grid)
    first = dispatcher.gather(request_for(UNITS, round=0, size=SIZE), COSTS).total
    part = first[5:7]
    for round in range(1, 4):
        dispatcher.gather(request_for(UNITS, round=round, size=SIZE), COSTS)
    assert np.array_equal(first, known_sum(UNITS, 0, SIZE))
    del first
    dispatcher.gather(request_for(UNITS, round=4, size=SIZE), COSTS)
    assert np.array_equal(part, known_sum(UNITS, 0, SIZE)[5:7])


def test_a_late_worker_writes_into_nobody_elses_sum(cluster: Cluster, tmp_path: Path) -> None:
    """One that was given up, and has not died yet, may finish and write: its room is not another's by then."""
    with RayGrid("mock_clients:app", {}, workers=2, address=cluster.address) as own:
        Dispatcher(own).gather(request_for(UNITS, size=SIZE), COSTS)  # each has said whether it sees segments
        dispatcher = Dispatcher(own, timeout=1.5)
        os.kill(victim := own.process_ids[1], signal.SIGSTOP)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(own, "_replace", lambda slot: own._slots.pop(1, None))  # it stays, frozen
            gathered = dispatcher.gather(request_for(UNITS, size=SIZE), COSTS)
        assert len(gathered.failures) == 1
        os.kill(victim, signal.SIGCONT)  # now it answers, and writes
        time.sleep(1.0)
        assert np.array_equal(gathered.total, known_sum(UNITS, 0, SIZE))
        rooms = own._transport._segments
        assert len(rooms._retired) == 1
        assert not rooms._retired & {segment.place.token for segment in rooms._free}


def keeping_app() -> Any:
    """Says how many of the arrays that came in earlier rounds, and that it keeps, are not what they were."""
    kept: list[tuple[np.ndarray, np.ndarray]] = []

    def tamper(request: TrainRequest, reply: TrainReply, node: int) -> TrainReply:
        changed = sum(not np.array_equal(now, then) for now, then in kept)
        kept.extend((array, array.copy()) for array in (request.units, request.next_units))
        return replace(reply, statistics=reply.statistics | {"changed": float(changed)})

    return make_app(tamper)


def test_units_are_the_receivers_to_keep_however_many_they_are(cluster: Cluster) -> None:
    """A worker fetches the rows of the next round's while others of this round's messages are answered long ago."""
    units = np.arange(20_000)
    with RayGrid(keeping_app, workers=1, address=cluster.address) as own:
        dispatcher = Dispatcher(own)
        for round in range(4):
            request = request_for(units + round, round=round, size=SIZE)
            gathered = dispatcher.gather(request, np.ones(20_000), next_units=units + round + 1)
            assert gathered.statistics["changed"] == 0
        content = request_for(units, size=SIZE).to_record()
        _, names, copies = own._transport._broadcasts.split(content, "9", near=True)
        assert {name for name, copy in zip(names, copies, strict=True) if isinstance(copy, dict)} == {"parameters"}
        assert set(names) == {"parameters", "units"}


def test_where_no_segment_is_to_be_had_ray_carries_what_is_large(
    grid: RayGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(os, "memfd_create", refused)
    assert not Segments.possible()
    monkeypatch.setattr(grid._transport._segments, "_free", [])
    gathered = Dispatcher(grid).gather(request_for(UNITS, size=SIZE), COSTS)
    assert np.array_equal(gathered.total, known_sum(UNITS, 0, SIZE))
    assert not gathered.failures


def test_messages_that_wait_in_line_get_no_room_each(grid: RayGrid) -> None:
    """A thousand of them would take a thousand models of memory."""
    made = len(grid._transport._segments._free)
    gathered = Dispatcher(grid, units_per_message=1).gather(request_for(UNITS, size=SIZE), COSTS)
    assert np.array_equal(gathered.total, known_sum(UNITS, 0, SIZE))
    del gathered
    gc.collect()
    assert len(grid._transport._segments._free) <= max(made, 4)


def reading_app() -> Any:
    """Says between which values its parameters lie, as they are once the gate is open."""

    def tamper(request: TrainRequest, reply: TrainReply, node: int) -> TrainReply:
        least, most = float(request.parameters.min()), float(request.parameters.max())
        return replace(reply, statistics=reply.statistics | {"least": least, "most": most})

    return make_app(tamper)


@pytest.mark.parametrize("sums", ["server", "nodes"])
def test_what_a_message_came_with_stays_until_it_is_answered(cluster: Cluster, tmp_path: Path, sums: Any) -> None:
    """Parameters that were sent may be dropped at once, and others sent: until then the message holds what its worker
    reads, whichever way its sum comes back."""
    gate = tmp_path / "gate"
    gate.touch()
    with RayGrid(reading_app, {"gate": str(gate)}, workers=1, address=cluster.address) as own:
        Dispatcher(own, sums=sums).gather(request_for(UNITS, size=SIZE), COSTS)
        gate.unlink()
        ids = []
        for round in range(4):
            parameters = np.full(SIZE, round, np.float32)
            content = request_for(UNITS, round=round, size=SIZE, parameters=parameters).to_record()
            ids += own.push_messages([Message(content, 1, TRAIN, group_id=str(round))])
            del content, parameters
            gc.collect()
        carried = [sent.carried for sent in own._sent.values()]
        assert [one.room is not None for one in carried] == [sums == "server", False, False, False]
        assert [one.total is not None for one in carried] == [sums == "nodes"] * 4
        del carried
        gate.touch()
        replies = []
        while len(replies) < len(ids):
            replies += own.wait(ids)
    for reply in (TrainReply.from_record(one.content) for one in replies):
        assert (reply.statistics["least"], reply.statistics["most"]) == (reply.round, reply.round)
        assert sums == "nodes" or np.array_equal(reply.total, known_sum(UNITS, reply.round, SIZE))
