"""What nodes may answer, and when: each counts once, within its clip, in its own round, or as zero."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from mock_nodes import StockGrid, node_app, train, values_of

from fedsim.clip import Clip
from fedsim.engine.node_messages import NodeReply, NodeRequest
from fedsim.errors import InvalidInput
from fedsim.privacy.ledger import read_entries
from server.strategy.asking import Tally, update_in

PARTITION = 5
"""The partition that misbehaves, one whose update is clipped."""
NODE = PARTITION + 1
EVERYBODY: dict[str, Any] = {"sampling_probability": 1.0}


def with_update(message: Message, reply: Message, change: Callable[[NodeReply], NodeReply]) -> list[Message]:
    changed = change(NodeReply.from_record(reply.content))
    return [Message(changed.to_record(), reply_to=message)]


def changed(values: Callable[[np.ndarray], np.ndarray]) -> Callable[[Message, Message], list[Message]]:
    return lambda m, r: with_update(m, r, lambda one: replace(one, update=values(one.update)))


def spoiled(update: np.ndarray, value: float) -> np.ndarray:
    update[3] = value
    return update


def from_another(message: Message, reply: Message) -> list[Message]:
    reply.metadata.__dict__["_src_node_id"] = 99
    return [reply]


def broken(message: Message, data: bytes) -> list[Message]:
    update = ArrayRecord({"flat": Array("float32", (16,), "numpy.ndarray", data)})
    content = RecordDict({"fedsim.reply": ConfigRecord({"round": 0}), "fedsim.update": update})
    return [Message(content, reply_to=message)]


ZERO: dict[str, Callable[[Message, Message], list[Message]]] = {
    "nothing": lambda m, r: [],
    "an error": lambda m, r: [Message(Error(code=2, reason="it broke"), reply_to=m)],
    "nan": changed(lambda update: spoiled(update, np.nan)),
    "infinite": changed(lambda update: spoiled(update, np.inf)),
    "too short": changed(lambda update: update[:-1]),
    "too long": changed(lambda update: np.append(update, update[:1])),
    "of two axes": changed(lambda update: update.reshape(4, 4)),
    "float64": changed(lambda update: update.astype(np.float64)),
    "whole numbers": changed(lambda update: np.ones(16, dtype=np.int64)),
    "of another round": lambda m, r: with_update(m, r, lambda one: replace(one, round=one.round + 1)),
    "of another node": from_another,
    "without the mod": lambda m, r: [Message(RecordDict({"arrays": ArrayRecord([np.ones(16)])}), reply_to=m)],
    "without an update": lambda m, r: [Message(RecordDict({"fedsim.reply": ConfigRecord({"round": 0})}), reply_to=m)],
    "of broken bytes": lambda m, r: broken(m, b""),
    "of other bytes": lambda m, r: broken(m, b"PK\x03\x04 no array"),
    "under another name": lambda m, r: [
        Message(
            RecordDict(
                {
                    "fedsim.reply": ConfigRecord({"round": 0}),
                    "fedsim.update": ArrayRecord({"w": Array(np.ones(16, dtype=np.float32))}),
                }
            ),
            reply_to=m,
        )
    ],
}


def only(tamper: Callable[[Message, Message], list[Message]]) -> Callable[[Message, Message], list[Message]]:
    return lambda m, r: tamper(m, r) if m.metadata.dst_node_id == NODE else [r]


def run(folder: Path, grid: StockGrid, *, rounds: int = 1, timeout: float = 0.3) -> np.ndarray:
    return values_of(train(folder, grid, rounds=rounds, timeout=timeout, **EVERYBODY).arrays)


@pytest.fixture
def without_it(tmp_path: Path) -> np.ndarray:
    """The weights where the node's update is zero."""
    return run(tmp_path / "without", StockGrid(node_app(idle=(PARTITION,)), 12))


@pytest.fixture
def with_it(tmp_path: Path) -> np.ndarray:
    """The weights where all goes well."""
    return run(tmp_path / "with", StockGrid(node_app(), 12))


@pytest.mark.parametrize("how", ZERO)
def test_what_is_no_update_counts_as_zero(
    how: str, tmp_path: Path, without_it: np.ndarray, with_it: np.ndarray
) -> None:
    found = run(tmp_path / "run", StockGrid(node_app(), 12, only(ZERO[how])))
    assert np.array_equal(found, without_it)
    assert not np.array_equal(found, with_it)


def test_a_node_that_cannot_be_reached_counts_as_zero(tmp_path: Path, without_it: np.ndarray) -> None:
    grid = StockGrid(node_app(), 12)
    grid.unreachable = {NODE}
    assert np.array_equal(run(tmp_path / "run", grid), without_it)


def test_an_app_that_raises_counts_as_zero(tmp_path: Path, without_it: np.ndarray) -> None:
    def raising(message: Message, context: Any, call_next: Any) -> Message:
        if context.node_id == NODE:
            raise RuntimeError("no data here")
        reply: Message = call_next(message, context)
        return reply

    from clients.mod import user_level_clip_mod

    grid = StockGrid(node_app(mods=[user_level_clip_mod, raising]), 12)
    assert np.array_equal(run(tmp_path / "run", grid), without_it)


@pytest.mark.parametrize("copies", [2, 5])
def test_a_reply_that_comes_again_counts_once(copies: int, tmp_path: Path, with_it: np.ndarray) -> None:
    grid = StockGrid(node_app(), 12, only(lambda m, r: [r] * copies))
    assert np.array_equal(run(tmp_path / "run", grid), with_it)


def test_a_reply_that_comes_in_a_later_round_never_counts(tmp_path: Path) -> None:
    """It is handed over with the next round's replies, by a grid that does not ask for which they are."""
    late: list[Message] = []

    def first_round_late(message: Message, reply: Message) -> list[Message]:
        if message.metadata.group_id == "1":
            late.append(reply)
            return []
        if late:
            grid.stray, late[:] = list(late), []
        return [reply]

    def never(message: Message, reply: Message) -> list[Message]:
        return [] if message.metadata.group_id == "1" else [reply]

    grid = StockGrid(node_app(), 12, only(first_round_late))
    found = run(tmp_path / "late", grid, rounds=2)
    assert not late
    assert grid.stray == []
    lost = run(tmp_path / "lost", StockGrid(node_app(), 12, only(never)), rounds=2)
    assert np.array_equal(found, lost)


def test_an_update_that_was_not_clipped_is_clipped_by_the_server(tmp_path: Path, with_it: np.ndarray) -> None:
    grid = StockGrid(node_app(), 12, only(changed(lambda update: update * np.float32(1000))))
    assert np.allclose(run(tmp_path / "run", grid), with_it, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1 + 1e-7, 1.01, 1e4, 1e30])
def test_no_update_enters_the_sum_with_more_than_the_clip(scale: float) -> None:
    rng = np.random.default_rng(3)
    sizes, clip, resolution = {"w": 50}, Clip(norm=0.7), 2.0**-40
    for _ in range(50):
        update = rng.normal(size=50)
        update = (update / np.linalg.norm(update) * 0.7 * scale).astype(np.float32)
        tally = Tally(clip=clip, sizes=sizes, resolution=resolution)
        request = NodeRequest(round=0, clip=clip)
        tally.take([(1, _Reply(update))], request)  # type: ignore[list-item]
        steps = [int(value) for value in tally.total]
        assert sum(step * step for step in steps) <= (0.7 / resolution) ** 2
        assert tally.counts["counted"] == 1
        assert sum(step * step for step in steps) >= (0.69 / resolution) ** 2


class _Reply:
    """A message from node 1."""

    def __init__(self, update: np.ndarray) -> None:
        self.content = NodeReply(round=0, update=update).to_record()
        self.metadata = type("Metadata", (), {"src_node_id": 1})

    def has_error(self) -> bool:
        return False


def test_the_divisor_does_not_follow_who_answers(tmp_path: Path, without_it: np.ndarray, with_it: np.ndarray) -> None:
    """One node's update is the whole change: (θ without it) − (θ with it) is its update over qN."""
    reply = []

    def kept(message: Message, one: Message) -> list[Message]:
        reply.append(update_in(one, NodeRequest(round=0, clip=Clip(norm=1.0)), NODE, 16))
        return [one]

    run(tmp_path / "run", StockGrid(node_app(), 12, only(kept)))
    assert np.allclose(without_it - with_it, reply[0] / 12, rtol=0, atol=1e-6)


class Growing(StockGrid):
    """A grid that nodes join when the first round is over."""

    def __init__(self, first: int, later: int) -> None:
        super().__init__(node_app(), later)
        self._first = first

    def get_node_ids(self) -> list[int]:
        began = any(message.metadata.group_id == "1" for message in self.asked)
        return super().get_node_ids()[: None if began else self._first]


def test_newcomers_take_part_while_there_are_places(tmp_path: Path) -> None:
    grid = Growing(8, 12)
    train(tmp_path / "some", grid, rounds=2, min_available_nodes=8, **EVERYBODY)
    asked = [(m.metadata.group_id, m.metadata.dst_node_id) for m in grid.asked]
    assert asked == [("1", node) for node in range(1, 9)] + [("2", node) for node in range(1, 13)]


def test_no_newcomer_takes_anothers_place(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="population_size is 12; it must be at least the 13 nodes seen"):
        train(tmp_path / "more", Growing(8, 13), rounds=3, min_available_nodes=8, **EVERYBODY)
    assert len(read_entries(tmp_path / "more" / "ledger.jsonl")) == 1


def test_one_time_out_is_for_all_nodes_of_a_round(tmp_path: Path) -> None:
    started = time.monotonic()
    grid = StockGrid(node_app(), 12, lambda m, r: [] if m.metadata.dst_node_id > 2 else [r])
    run(tmp_path / "run", grid, timeout=0.2)
    assert time.monotonic() - started >= 0.2
