"""Fuzzers of what server and workers say to each other: a damaged message costs a worker its part, never the sum.

Values of a sum or of parameters that are others, but could be right, nobody can tell: what is damaged is how a message
is laid out, and everything that says what it is about.
"""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from disk_fuzzers import edited, edits
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from fuzzing import fuzzing
from hypothesis import strategies as st
from mock_clients import known_sum, make_app, request_for

from experiments.audit.canaries import CanaryUsers
from fedsim.engine.evaluation_messages import EvaluateReply, EvaluateRequest
from fedsim.engine.local import LocalGrid
from fedsim.engine.node_messages import NodeReply, NodeRequest
from fedsim.engine.totals import BadReply
from server.dispatch import Dispatcher
from server.evaluation import EvaluationFailed, evaluate
from server.packing import Roster
from server.strategy.asking import update_in

UNITS, ROWS = np.array([3, 5, 8, 13]), np.arange(4)
SCALARS = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=8), st.binary(max_size=4),
    st.lists(st.integers(-5, 5), max_size=2),
)  # fmt: skip
DTYPES = st.sampled_from(["int64", "float32", "float64", "uint8", "bool", "U3", "S2", "complex64", "datetime64[s]"])
VALUES = st.tuples(DTYPES, st.lists(st.integers(0, 3), max_size=3))
"""Arrays of other types and shapes: a type, and a shape of less values than a model has."""
NAMES = st.sampled_from(["units", "request", "reply", "total", "flat", "kept", "refusal", "measured", "rows", "x"])
DAMAGES = st.lists(
    st.tuples(
        st.floats(0, 0.99),
        st.floats(0, 0.99),
        st.one_of(
            st.tuples(st.sampled_from(["drop record", "empty record", "drop value"]), st.none()),
            st.tuples(st.sampled_from(["rename record", "rename value"]), NAMES),
            st.tuples(st.just("scalar"), SCALARS),
            st.tuples(st.just("record of scalars"), SCALARS),
            st.tuples(st.just("array"), VALUES),
            st.tuples(st.just("other type"), DTYPES),
            st.tuples(st.just("cut"), st.floats(0, 0.99)),
            st.tuples(st.just("edits"), edits),
            st.tuples(st.just("type"), st.text(max_size=8)),
        ),
    ),
    min_size=1,
    max_size=3,
)


def damaged(record: RecordDict, damages: list[tuple[float, float, tuple[str, Any]]]) -> RecordDict:
    """A copy with each damage done at a record and a value in it, if there is one to do it to."""
    records: dict[str, dict[str, Any]] = {name: dict(record[name]) for name in record}
    for where, which, (how, new) in damages:
        if not records:
            break
        name = sorted(records)[int(where * len(records))]
        values = records[name]
        key = sorted(values)[int(which * len(values))] if values else "x"
        value = values.get(key)
        if how == "drop record":
            del records[name]
        elif how == "empty record":
            values.clear()
        elif how == "rename record":
            records[new] = records.pop(name)
        elif how == "record of scalars":
            records[name] = {"reason": new}
        elif how == "drop value":
            values.pop(key, None)
        elif how == "rename value" and key in values:
            values[new] = values.pop(key)
        elif how == "array" and (isinstance(value, Array) or not values):
            values[key] = Array(np.ones(tuple(new[1])).astype(new[0]))
        elif how == "scalar" and not isinstance(value, Array) and (key != "resolution" or not isinstance(new, float)):
            values[key] = new
        elif how == "other type" and isinstance(value, Array):
            with contextlib.suppress(Exception):  # what was damaged before may be no array any more
                values[key] = Array(value.numpy().astype(new))
        elif isinstance(value, Array):
            data = value.data
            if how == "cut":
                data = data[: int(new * len(data))]
            elif how == "edits" and key != "flat":
                data = edited(data, new)
            values[key] = Array(value.dtype, value.shape, new if how == "type" else value.stype, data)
    return RecordDict({name: _record(values) for name, values in records.items()})


def _record(values: dict[str, Any]) -> ArrayRecord | ConfigRecord:
    if values and all(isinstance(value, Array) for value in values.values()):
        return ArrayRecord(values)
    return ConfigRecord({key: value for key, value in values.items() if not isinstance(value, Array)})


class DamagingGrid(LocalGrid):
    """What its first worker is asked, or what it answers, is damaged on the way."""

    damages: Any = ()
    of_requests = False

    def _answer(self, message: Message) -> Message:
        hit = message.metadata.dst_node_id == 1
        if hit and self.of_requests:
            message.content = damaged(message.content, self.damages)
        reply = super()._answer(message)
        if hit and not self.of_requests and reply.has_content():
            reply.content = damaged(reply.content, self.damages)
        return reply


def _grid(app: ClientApp, damages: Any, of_requests: bool) -> DamagingGrid:
    logging.getLogger("server").setLevel(logging.ERROR)  # each message that is computed anew is told of
    grid = DamagingGrid(app, workers=2)
    grid.damages, grid.of_requests = damages, of_requests
    return grid


def _training(of_requests: bool) -> Callable[..., None]:
    app = make_app()

    @fuzzing(DAMAGES, st.booleans())
    def fuzz(damages: Any, exact: bool) -> None:
        dispatcher = Dispatcher(_grid(app, damages, of_requests))
        resolution = 2.0**-24 if exact else 0.0
        gathered = dispatcher.gather(request_for(UNITS, resolution=resolution), np.ones(len(UNITS)))
        total = np.asarray(gathered.total, dtype=np.float64) * (resolution or 1.0)
        np.testing.assert_array_equal(total, known_sum(UNITS, 0, 40))
        assert gathered.units == len(UNITS)

    return fuzz


def requests(folder: Path) -> Callable[..., None]:
    """Damaged requests: whatever that worker makes of them, the sum is of the units asked for."""
    return _training(True)


def replies(folder: Path) -> Callable[..., None]:
    """Damaged replies: refused, and computed by the other worker."""
    return _training(False)


def updates(folder: Path) -> Callable[..., None]:
    """Damaged updates of nodes: refused, or a vector that can be added."""
    request = NodeRequest(round=3, clip=request_for(UNITS).clip)
    sent = NodeReply(round=3, update=np.ones(40, dtype=np.float32)).to_record()
    _grid(make_app(), (), of_requests=False)  # only where there is a grid may messages be made

    @fuzzing(DAMAGES)
    def fuzz(damages: Any) -> None:
        asked = Message(RecordDict(), 7, "train")
        try:
            update = update_in(Message(damaged(sent, damages), reply_to=asked), request, 7, 40)
        except BadReply:
            return
        assert (update.dtype, update.shape) == (np.float32, (40,))
        assert np.isfinite(update).all()

    return fuzz


def evaluations(folder: Path) -> Callable[..., None]:
    """Damaged messages about held-out users: a measurement of all rows, or a sentence."""
    app, users = ClientApp(), CanaryUsers(np.ones(4, dtype=np.int64), np.zeros(4))

    @app.evaluate()
    def answer(message: Message, context: Context) -> Message:
        rows = EvaluateRequest.from_record(message.content).rows
        counts = np.full(len(rows), 0x01010101)  # no edit or two make nothing of it, as of a user without labels
        reply = EvaluateReply(rows=rows, loss_sum=counts * 2.0, label_count=counts, correct=counts)
        return Message(reply.to_record(), reply_to=message)

    @fuzzing(DAMAGES, st.booleans())
    def fuzz(damages: Any, of_requests: bool) -> None:
        roster = Roster(_grid(app, damages, of_requests))
        try:
            measured = evaluate(roster, users, "test", ROWS, np.zeros(40, dtype=np.float32))
        except EvaluationFailed:
            return
        assert len(measured.users) == len(ROWS)
        assert 0 <= measured.accuracy <= 1

    return fuzz
