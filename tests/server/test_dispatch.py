"""A round over mock workers: sums, refusals, recomputation, and rounds that must fail."""

import time
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from mock_clients import CLIP, Tamper, known_sum, make_app, request_for

from fedsim.clip import Clip
from fedsim.engine.exact import dequantise, resolution_for
from fedsim.engine.local import LocalGrid
from fedsim.engine.messages import TrainReply, TrainRequest
from fedsim.errors import InvalidInput
from server import dispatch
from server.dispatch import Dispatcher, RoundFailed
from server.packing import Roster

UNITS = np.random.default_rng(3).permutation(500)[:101].astype(np.int64)
COSTS = np.random.default_rng(4).pareto(1.5, size=101) + 1


class CountingGrid(LocalGrid):
    """Remembers which units each worker was asked for."""

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        self.asked = getattr(self, "asked", [])
        self.asked += [(m.metadata.dst_node_id, TrainRequest.from_record(m.content)) for m in messages]
        return super().push_messages(messages)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("units_per_message", [None, 1, 7])
def test_sum_is_the_same_however_units_are_split(workers: int, units_per_message: int | None) -> None:
    grid = CountingGrid(make_app(), workers=workers)
    gathered = Dispatcher(grid, units_per_message=units_per_message).gather(request_for(UNITS, round=2), COSTS)
    assert np.array_equal(gathered.total, known_sum(UNITS, 2, 40))
    assert gathered.total.flags.writeable
    assert gathered.statistics["rows"] == gathered.units == len(UNITS)
    assert gathered.messages == len(grid.asked)
    if units_per_message is None:
        assert gathered.messages == workers
    else:
        assert max(len(request.units) for _, request in grid.asked) <= units_per_message


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("tensors", [False, True])
def test_a_sum_is_the_servers_own(workers: int, tensors: bool) -> None:
    """Writing to it writes to no worker's reply, which in one process may be what the worker goes on with."""
    replies = []

    def kept(request: TrainRequest, reply: TrainReply, node: int) -> TrainReply:
        replies.append(torch.from_numpy(reply.total) if tensors else reply.total)
        return replace(reply, total=replies[-1])

    grid = LocalGrid(make_app(kept), workers=workers)
    total = Dispatcher(grid).gather(request_for(UNITS), COSTS).total
    assert isinstance(total, torch.Tensor) == tensors
    assert np.array_equal(np.asarray(total), known_sum(UNITS, 0, 40))
    total += 1
    assert np.array_equal(sum(np.asarray(reply) for reply in replies), known_sum(UNITS, 0, 40))


@pytest.mark.parametrize("in_process", [True, False])
def test_the_seconds_of_a_round_are_the_busiest_workers(in_process: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all workers, where they take turns in one process."""

    def timed(request: TrainRequest, reply: TrainReply, node: int) -> TrainReply:
        seconds = {"seconds": 10.0 * node, "load_seconds": 1.0 * node, "compute_seconds": 7.0 * node}
        return replace(reply, statistics=reply.statistics | seconds)

    monkeypatch.setattr(LocalGrid, "in_process", in_process)
    gathered = Dispatcher(LocalGrid(make_app(timed), workers=3)).gather(request_for(UNITS), COSTS)
    times = 6 if in_process else 3
    assert gathered.phases == {"load": 1.0 * times, "compute": 7.0 * times}
    assert gathered.compute_seconds == 10.0 * times


@pytest.mark.parametrize("in_process", [True, False])
def test_a_workers_seconds_are_those_of_all_its_messages(in_process: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {1: 0.0, 2: 0.0, 3: 0.0}

    def timed(request: TrainRequest, reply: TrainReply, node: int) -> TrainReply:
        seconds = float(2 + node + len(request.units) % 4)
        spent[node] += seconds
        return replace(reply, statistics=reply.statistics | {"seconds": seconds, "load_seconds": seconds / 2})

    monkeypatch.setattr(LocalGrid, "in_process", in_process)
    dispatcher = Dispatcher(LocalGrid(make_app(timed), workers=3), units_per_message=6)
    gathered = dispatcher.gather(request_for(UNITS), COSTS)
    assert gathered.messages > 12
    assert gathered.compute_seconds == (sum if in_process else max)(spent.values())
    assert gathered.phases["load"] == gathered.compute_seconds / 2


def test_a_round_of_no_replies_took_no_workers_seconds() -> None:
    gathered = Dispatcher(LocalGrid(make_app(), workers=2)).gather(request_for(UNITS[:0]), COSTS[:0])
    assert (gathered.compute_seconds, dict(gathered.phases)) == (0.0, {})


def test_more_workers_than_units() -> None:
    gathered = Dispatcher(LocalGrid(make_app(), workers=8)).gather(request_for(UNITS[:3]), COSTS[:3])
    assert np.array_equal(gathered.total, known_sum(UNITS[:3], 0, 40))
    assert gathered.messages == 3


@pytest.mark.parametrize(("resolution", "dtype"), [(0.0, np.float32), (2.0**-40, np.int64)])
def test_empty_cohort_sends_nothing_and_sums_to_zero(resolution: float, dtype: type) -> None:
    grid = CountingGrid(make_app(), workers=2)
    gathered = Dispatcher(grid).gather(request_for(UNITS[:0], resolution=resolution), COSTS[:0])
    assert not hasattr(grid, "asked")
    assert gathered.messages == gathered.units == 0
    assert gathered.total.dtype == dtype
    assert np.array_equal(gathered.total, np.zeros(40))


def test_exact_sums_are_whole_steps() -> None:
    resolution = resolution_for(CLIP, 500)
    totals = [
        Dispatcher(LocalGrid(make_app(), workers=w), units_per_message=k)
        .gather(request_for(UNITS, resolution=resolution), COSTS)
        .total
        for w, k in [(1, None), (2, None), (4, 3)]
    ]
    assert totals[0].dtype == np.int64
    assert all(np.array_equal(total, totals[0]) for total in totals)
    assert np.array_equal(dequantise(totals[0], resolution), known_sum(UNITS, 0, 40))


def test_a_unit_twice_and_costs_that_do_not_match_are_refused() -> None:
    dispatcher = Dispatcher(LocalGrid(make_app()))
    with pytest.raises(InvalidInput, match="units"):
        dispatcher.gather(request_for(np.array([4, 5, 4])), np.ones(3))
    with pytest.raises(InvalidInput, match="costs"):
        dispatcher.gather(request_for(np.array([4, 5])), np.ones(3))


TAMPERED: dict[str, tuple[str, Tamper]] = {
    "round": ("answers round 1, not 0", lambda q, a, n: replace(a, round=a.round + 1)),
    "unit missing": ("stands for", lambda q, a, n: replace(a, units=a.units[1:])),
    "other unit": ("stands for", lambda q, a, n: replace(a, units=np.append(a.units[1:], 999))),
    "shape": ("its sum is", lambda q, a, n: replace(a, total=a.total[1:])),
    "float64": ("its sum is", lambda q, a, n: replace(a, total=a.total.astype(np.float64))),
    "nan": ("not finite", lambda q, a, n: replace(a, total=np.where(np.arange(40) == 7, np.float32(np.nan), a.total))),
    "inf": ("not finite", lambda q, a, n: replace(a, total=np.where(np.arange(40) == 7, np.float32(np.inf), a.total))),
    "length": ("norm", lambda q, a, n: replace(a, total=np.full(40, 1.001 * len(q.units) / 40**0.5, np.float32))),
    "count": ("clipped_units is 99", lambda q, a, n: replace(a, statistics={**a.statistics, "clipped_units": 99.0})),
    "norms": ("its norms are not", lambda q, a, n: replace(a, norms=np.ones(len(q.units) + 1, np.float32))),
    "norm nan": ("its norms are not", lambda q, a, n: replace(a, norms=np.float32([np.nan]))),
    "statistic": ("rows is nan", lambda q, a, n: replace(a, statistics={"rows": float("nan")})),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_bad_reply_is_refused_by_name_and_computed_elsewhere(kind: str) -> None:
    complaint, tamper = TAMPERED[kind]
    grid = CountingGrid(make_app(lambda q, a, n: tamper(q, a, n) if n == 2 else a), workers=3)
    gathered = Dispatcher(grid).gather(request_for(UNITS), COSTS)
    assert np.array_equal(gathered.total, known_sum(UNITS, 0, 40))
    assert gathered.statistics["rows"] == len(UNITS)
    assert len(gathered.failures) == 1
    assert "worker 2" in gathered.failures[0]
    assert complaint in gathered.failures[0]
    assert [node for node, _ in grid.asked].count(2) == 1


def test_a_sum_at_the_bound_is_taken_and_the_bound_is_that_of_the_requests_clip() -> None:
    longest: Tamper = lambda q, a, n: replace(a, total=np.full(40, len(q.units) / 40**0.5, np.float32))  # noqa: E731
    gathered = Dispatcher(LocalGrid(make_app(longest))).gather(request_for(UNITS), COSTS)
    np.testing.assert_allclose(np.linalg.norm(gathered.total), len(UNITS), rtol=1e-5)
    longer: Tamper = lambda q, a, n: replace(a, total=np.full(40, 2 * len(q.units) / 40**0.5, np.float32))  # noqa: E731
    with pytest.raises(RoundFailed):
        Dispatcher(LocalGrid(make_app(longer))).gather(request_for(UNITS), COSTS)
    wider = request_for(UNITS, clip=Clip(norm=1.0, scales={"all": 2.0}))
    assert not Dispatcher(LocalGrid(make_app(longer))).gather(wider, COSTS).failures


def test_sums_of_many_equal_updates_are_taken_though_each_addition_rounds() -> None:
    update, units = np.full(40, np.float32(1 / 40**0.5)), np.arange(20_000)
    one_by_one = np.zeros(40, dtype=np.float32)
    for _ in units:
        one_by_one += update
    assert np.linalg.norm(one_by_one) > len(units) * (1 + 1e-5)
    sums: Tamper = lambda q, a, n: replace(a, total=one_by_one)  # noqa: E731
    request = request_for(units, clip=Clip(norm=1.0))
    assert not Dispatcher(LocalGrid(make_app(sums))).gather(request, np.ones(len(units))).failures


def test_exact_sums_are_held_to_the_bound_too() -> None:
    resolution = resolution_for(CLIP, 500)
    huge: Tamper = lambda q, a, n: replace(a, total=np.full(40, 2**62, np.int64))  # noqa: E731
    with pytest.raises(RoundFailed, match="norm"):
        Dispatcher(LocalGrid(make_app(huge))).gather(request_for(UNITS, resolution=resolution), COSTS)


def test_a_record_that_is_no_reply_is_refused() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: object) -> Message:
        return Message(RecordDict(), reply_to=message)

    with pytest.raises(RoundFailed, match=r"worker 1 .*no training reply"):
        Dispatcher(LocalGrid(app)).gather(request_for(UNITS), COSTS)


def test_the_round_fails_when_every_worker_lies() -> None:
    grid = CountingGrid(make_app(lambda q, a, n: replace(a, round=7)), workers=3)
    with pytest.raises(RoundFailed, match="no other worker is left"):
        Dispatcher(grid, attempts=10).gather(request_for(UNITS), COSTS)
    assert [node for node, _ in grid.asked].count(1) == 1


def test_an_exception_in_the_client_is_tried_again_and_then_reported(tmp_path: object) -> None:
    request = request_for(UNITS, misfortune={"raise": int(UNITS[5])})
    once = LocalGrid(make_app(), {"marks": str(tmp_path)}, workers=1)
    gathered = Dispatcher(once).gather(request, COSTS)
    assert np.array_equal(gathered.total, known_sum(UNITS, 0, 40))
    assert "cursed" in gathered.failures[0]
    with pytest.raises(RoundFailed, match=r"(?s)worker \d failed.*cursed.*attempt 3 of 3"):
        Dispatcher(LocalGrid(make_app(), workers=2)).gather(request, COSTS)


class PlainGrid(Grid):
    """Only what Flower's Grid promises, over a LocalGrid; replies appear after some empty looks, or never."""

    def __init__(self, inner: LocalGrid, looks: int = 0, deaf: int = 0, late: bool = False) -> None:
        self.inner, self.looks, self.deaf, self.late = inner, looks, deaf, late
        self.pulls = self.handed_over_late = 0
        self.withheld: list[str] = []

    def set_run(self, run: object) -> None: ...

    @property
    def run(self) -> object:  # type: ignore[override]
        return self.inner.run

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        ids = self.inner.push_messages(messages)
        self.withheld += [i for i, m in zip(ids, messages, strict=True) if m.metadata.dst_node_id == self.deaf]
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.pulls += 1
        message_ids = list(message_ids)
        wanted = [i for i in message_ids if i not in self.withheld]
        if self.pulls <= self.looks:
            return []
        # A rude grid: also hands over replies that nobody asks for any more.
        extra = [i for i in self.withheld if self.late and i not in message_ids]
        self.handed_over_late += len(extra)
        return [reply for i in [*wanted, *extra] for reply in self.inner.pull_messages([i])]

    def send_and_receive(self, *args: object, **kwargs: object) -> list[Message]:
        raise NotImplementedError


def test_a_grid_that_cannot_wait_is_asked_again_and_again() -> None:
    grid = PlainGrid(LocalGrid(make_app(), workers=2), looks=5)
    gathered = Dispatcher(grid).gather(request_for(UNITS), COSTS)
    assert np.array_equal(gathered.total, known_sum(UNITS, 0, 40))
    assert grid.pulls > 5


@pytest.mark.parametrize("late", [False, True])
def test_what_is_not_answered_in_time_is_computed_elsewhere_and_counted_once(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "GRACE", 0.0)
    grid = PlainGrid(LocalGrid(make_app(), workers=3), deaf=2, late=late)
    gathered = Dispatcher(grid, timeout=0.2).gather(request_for(UNITS), COSTS)
    assert np.array_equal(gathered.total, known_sum(UNITS, 0, 40))
    assert bool(grid.handed_over_late) == late
    assert any("worker 2 failed" in failure and "no answer" in failure for failure in gathered.failures)


def test_no_worker_at_all_fails_at_once_when_told_not_to_wait() -> None:
    grid = LocalGrid(make_app())
    grid.close()
    began = time.monotonic()
    with pytest.raises(RoundFailed, match="no worker"):
        Dispatcher(grid, roster=Roster(grid, 0.0)).gather(request_for(UNITS), COSTS)
    assert time.monotonic() - began < 5


def test_workers_get_what_they_were_told_to_expect() -> None:
    grid = CountingGrid(make_app(), workers=3)
    dispatcher = Dispatcher(grid)
    later, later_costs = UNITS[::2] + 1000, COSTS[::2]
    dispatcher.gather(request_for(UNITS), COSTS, next_units=later, next_costs=later_costs)
    told = {node: request.next_units for node, request in grid.asked}
    assert sorted(np.concatenate(list(told.values()))) == sorted(later)
    grid.asked = []
    dispatcher.gather(request_for(later, round=1), later_costs)
    for node, request in grid.asked:
        assert np.array_equal(np.sort(request.units), np.sort(told[node]))


def test_a_wrong_announcement_does_no_harm() -> None:
    dispatcher = Dispatcher(LocalGrid(make_app(), workers=2))
    dispatcher.gather(request_for(UNITS), COSTS, next_units=UNITS[:9])
    gathered = dispatcher.gather(request_for(UNITS, round=1), COSTS)
    assert np.array_equal(gathered.total, known_sum(UNITS, 1, 40))


@pytest.mark.parametrize("options", [{"units_per_message": 0}, {"timeout": 0.0}, {"attempts": 0}, {"sums": "workers"}])
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(InvalidInput, match=next(iter(options))):
        Dispatcher(LocalGrid(make_app()), **options)


def test_a_slow_worker_gets_less() -> None:
    def slow(request: TrainRequest, reply: TrainReply, node: int) -> TrainReply:
        return replace(reply, statistics={"seconds": len(request.units) * (3.0 if node == 1 else 1.0)})

    grid = CountingGrid(make_app(slow), workers=2)
    dispatcher = Dispatcher(grid)
    units, costs = np.arange(400), np.ones(400)
    for round in range(6):
        grid.asked = []
        dispatcher.gather(request_for(units, round=round), costs)
    shares = {node: len(request.units) for node, request in grid.asked}
    assert shares == {1: 100, 2: 300}
