"""Requests and replies as records: nothing lost, nothing copied, nothing kept alive."""

import dataclasses
import gc
import pickle
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from mock_clients import honest_reply, make_app, request_for

from fedsim.clip import Clip, ClipBlock
from fedsim.engine.arrays import HeldArray, arrays, scalars
from fedsim.engine.grid import stamp
from fedsim.engine.local import LocalGrid
from fedsim.engine.messages import TRAIN, TrainReply, TrainRequest

UNITS = np.array([4, 1, 7])
CLIPPED = Clip(norm=0.5, scales={"a": 0.5, "b": 2.0}, blocks=(ClipBlock(parameters=("a", "b"), share=0.75),))


def test_a_request_comes_back_as_it_was() -> None:
    sent = request_for(
        UNITS,
        round=3,
        clip=CLIPPED,
        resolution=2.0**-30,
        next_units=np.array([9]),
        plan="{}",
        sampling_seed=11,
    )
    got = TrainRequest.from_record(sent.to_record())
    assert np.array_equal(got.units, UNITS)
    assert np.array_equal(got.next_units, [9])
    assert (got.round, got.clip) == (3, CLIPPED)
    assert (got.resolution, got.plan, got.sampling_seed) == (2.0**-30, "{}", 11)
    assert got.shared is sent.shared
    assert np.shares_memory(got.parameters, sent.parameters)
    assert not got.parameters.flags.writeable


def test_requests_of_a_round_differ_in_their_units_alone_and_share_the_rest() -> None:
    asked = request_for(UNITS, round=3, clip=CLIPPED, resolution=2.0**-30, plan="{}", sampling_seed=11)
    parts = [(UNITS[:2], np.array([9])), (UNITS[2:], np.array([5, 6]))]
    records = [asked.record_for(units, ahead) for units, ahead in parts]
    for record, (units, ahead) in zip(records, parts, strict=True):
        got = TrainRequest.from_record(record)
        assert np.array_equal(got.units, units)
        assert np.array_equal(got.next_units, ahead)
        assert (got.round, got.clip, got.resolution, got.plan) == (3, CLIPPED, 2.0**-30, "{}")
    first, second = records
    assert all(first[name] is second[name] for name in ("request", "parameters"))
    del first["parameters"]  # a receiver's own record is its own
    assert "parameters" in second
    assert "parameters" in asked.to_record()


def test_a_request_made_from_another_says_what_is_its_own() -> None:
    asked = request_for(UNITS, round=3)
    asked.to_record()
    assert TrainRequest.from_record(dataclasses.replace(asked, round=4).to_record()).round == 4


def test_no_two_messages_of_any_process_have_the_same_id() -> None:
    LocalGrid(make_app())  # says who sends
    message = Message(request_for(UNITS).to_record(), 1, TRAIN)
    here = [stamp(message) for _ in range(1000)]
    assert message.metadata.message_id == here[-1]
    assert len(set(here)) == len(here)
    elsewhere = "import fedsim.engine.grid as grid; print(grid._PROCESS)"
    said = subprocess.run([sys.executable, "-c", elsewhere], capture_output=True, text=True, check=True).stdout
    assert not any(one.startswith(said.strip()) for one in here)


def test_a_reply_comes_back_as_it_was_without_a_copy() -> None:
    sent = honest_reply(request_for(UNITS))
    got = TrainReply.from_record(sent.to_record())
    assert np.shares_memory(got.total, sent.total)
    assert np.array_equal(got.units, UNITS)
    assert got.statistics == sent.statistics
    assert np.array_equal(got.norms, sent.norms)


def test_tensors_cross_a_process_as_they_are_and_a_wire_as_numpy_bytes() -> None:
    flat = torch.arange(5.0)
    request = TrainRequest(round=0, units=UNITS, clip=CLIPPED, parameters=flat)
    record = request.to_record()
    assert TrainRequest.from_record(record).parameters is flat
    sent = pickle.loads(pickle.dumps(arrays(record, "parameters")["flat"]))
    ours, theirs = arrays(record, "parameters")["flat"], Array(flat.numpy())
    assert (ours.dtype, ours.shape, ours.data) == (theirs.dtype, theirs.shape, theirs.data)
    for array in (ours, sent):
        assert np.array_equal(array.numpy(), flat.numpy())
        assert not array.numpy().flags.writeable


def test_reading_a_message_leaves_no_cycle_that_holds_its_arrays() -> None:
    gc.collect()
    gc.disable()
    try:
        record = honest_reply(request_for(UNITS)).to_record()
        values = weakref.ref(arrays(record, "total")["flat"].__dict__["_held"])
        reply = TrainReply.from_record(record)
        assert values() is not None
        del record, reply
        assert values() is None
        request = request_for(UNITS)
        values = weakref.ref(request.shared["flat"].__dict__["_held"])
        received = TrainRequest.from_record(request.to_record())
        del request, received
        assert values() is None
    finally:
        gc.enable()


def test_records_of_the_wrong_kind_are_refused() -> None:
    content = RecordDict({"arrays": ArrayRecord(), "scalars": ConfigRecord()})
    with pytest.raises(TypeError, match="no arrays"):
        arrays(content, "scalars")
    with pytest.raises(TypeError, match="no scalars"):
        scalars(content, "arrays")
    with pytest.raises(KeyError):
        arrays(content, "absent")


def test_an_adopted_array_replaces_the_values_held() -> None:
    array = HeldArray(np.zeros(4))
    before = weakref.ref(array.__dict__["_held"])
    array.adopt(np.zeros(4))
    assert before() is None
