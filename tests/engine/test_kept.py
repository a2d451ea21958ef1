"""Sums that stay with their workers are held to what a sum that comes is held to."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from clients.shard import NotHeld, Shard
from fedsim.clip import Clip
from fedsim.config import OptimizerConfig
from fedsim.engine.arrays import array_record
from fedsim.engine.collective import Meeting, Rendezvous
from fedsim.engine.kept import KeptParameters, KeptPart, KeptSum, KeptSums
from fedsim.engine.messages import TrainReply, TrainRequest
from fedsim.engine.replies import check_answer, read_reply
from fedsim.engine.shard_messages import PARAMETERS, TakeRequest, TellRequest
from fedsim.engine.totals import BadReply, Expected
from fedsim.engine.work import Done, Work

SIZE = 5
KEPT = KeptParameters(group="these", version=3, size=SIZE)
AFTER = dataclasses.replace(KEPT, version=4)
REQUEST = TrainRequest(round=0, units=np.arange(2), clip=Clip(norm=1.0), parameters=KEPT)
PART = KeptPart(name="part", units=np.arange(2), statistics={"rows": 2.0}, norms=np.ones(2, dtype=np.float32))
TOTAL = KeptSum(parts=(PART,), size=SIZE, dtype="float32", norm=1.5)
REPLY = TrainReply(
    round=0, units=PART.units, total=TOTAL, statistics={"rows": 2.0}, norms=np.ones(2, dtype=np.float32)
)


def test_what_stays_is_named_in_its_message() -> None:
    asked = TrainRequest.from_record(REQUEST.to_record())
    assert asked.parameters == KEPT
    assert not asked.shared
    reply = read_reply(REPLY.to_record())
    check_answer(reply, asked, asked.units)
    sums = KeptSums(Expected.of(asked))
    sums.add("one", reply.total, Expected.of(asked))
    assert sums.settle() == {}
    total = sums.total()
    assert (total.names, total.size, total.dtype, total.norm) == (("part",), SIZE, "float32", 1.5)
    assert total.parts[0].statistics == PART.statistics
    assert np.array_equal(total.parts[0].units, PART.units)


def test_the_sum_of_nobody_has_no_parts() -> None:
    total = KeptSums(Expected.of(REQUEST)).total()
    assert (total.names, total.size, total.dtype) == ((), SIZE, "float32")


@pytest.mark.parametrize(
    "total",
    [
        dataclasses.replace(TOTAL, size=SIZE + 1),
        dataclasses.replace(TOTAL, dtype="int64"),
        dataclasses.replace(TOTAL, norm=2.1),
        dataclasses.replace(TOTAL, norm=-1.0),
        dataclasses.replace(TOTAL, norm=float("nan")),
        dataclasses.replace(TOTAL, norm=float("inf")),
        np.zeros(SIZE, dtype=np.float32),
    ],
)
def test_the_server_compares_what_a_worker_says_of_its_sum(total: Any) -> None:
    sums = KeptSums(Expected.of(REQUEST))
    with pytest.raises(BadReply):
        sums.add("one", total, Expected.of(REQUEST))
    assert sums.total().names == ()


def test_a_sum_may_stay_only_where_it_is_to() -> None:
    came = dataclasses.replace(REPLY, total=np.zeros(SIZE, dtype=np.float32))
    sent = dataclasses.replace(REQUEST, parameters=np.zeros(SIZE, dtype=np.float32))
    check_answer(came, sent, sent.units)
    for reply, request in ((came, REQUEST), (REPLY, sent)):
        with pytest.raises(BadReply, match="stays where it was to come"):
            check_answer(reply, request, request.units)


class Gives:
    """A worker with a given sum."""

    def __init__(self, total: np.ndarray) -> None:
        self.total = total

    def train(self, request: Work) -> Done:
        return Done(round=request.round, units=request.units, total=self.total, statistics={})


@pytest.fixture
def alone() -> Any:
    """A shard that is the only one."""
    shard, rendezvous = Shard(), Rendezvous("127.0.0.1", 20.0)
    meeting = Meeting(host="127.0.0.1", port=rendezvous.port, name="one", rank=0, owners=1, seconds=20.0)
    state = {PARAMETERS: np.zeros(SIZE, dtype=np.float32), "schedule_round": np.array(0, dtype=np.int64)}
    optimizer = dataclasses.asdict(OptimizerConfig(name="sgd"))
    shard.take(TakeRequest(kept=KEPT, meeting=meeting, optimizer=optimizer, rounds=9, state=array_record(**state)))
    yield shard
    rendezvous.close()


@pytest.mark.parametrize(
    ("total", "resolution"),
    [
        (np.zeros(SIZE + 1, dtype=np.float32), 0.0),
        (np.zeros(SIZE, dtype=np.float64), 0.0),
        (np.zeros(SIZE, dtype=np.int64), 0.0),
        (np.zeros(SIZE, dtype=np.float32), 0.5),
        (np.full(SIZE, 1.0, dtype=np.float32), 0.0),
        (np.full(SIZE, 2, dtype=np.int64), 0.5),
        (np.array([0, 0, np.nan, 0, 0], dtype=np.float32), 0.0),
        (np.array([0, -np.inf, 0, 0, 0], dtype=np.float32), 0.0),
    ],
)
def test_a_worker_keeps_no_sum_that_the_server_would_refuse(
    alone: Shard, total: np.ndarray, resolution: float
) -> None:
    with pytest.raises(BadReply):
        alone.train(Gives(total), dataclasses.replace(REQUEST, resolution=resolution))
    assert alone.tell(TellRequest(kept=KEPT)).parts == ()


def test_a_worker_tells_the_norm_of_the_sum_that_it_keeps(alone: Shard) -> None:
    reply = alone.train(Gives(np.full(SIZE, 1, dtype=np.int64)), dataclasses.replace(REQUEST, resolution=0.5))
    assert reply.total.norm == pytest.approx(0.5 * np.sqrt(SIZE))
    assert alone.tell(TellRequest(kept=KEPT)).parts == reply.total.names
    with pytest.raises(NotHeld):
        alone.train(
            Gives(np.zeros(SIZE, dtype=np.float32)),
            dataclasses.replace(REQUEST, parameters=dataclasses.replace(KEPT, version=4)),
        )
