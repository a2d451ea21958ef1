"""The dispatcher and the messages on stock Flower."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedsim.engine.arrays import HeldArray, array_record, stored_bytes

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.usefixtures("cluster")
def test_rounds_on_flowers_own_engine() -> None:
    """On a cluster that Flower starts, not on one of two nodes that happens to run here."""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("stock_flower_round.py"))],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(lines[0].removeprefix("RESULT "))
    assert not result["ours"]
    assert all(round["right"] for round in result["rounds"])
    assert result["nodes"] == 1
    assert [round["messages"] for round in result["rounds"]] == [3, 9, 3]


def test_a_numpy_array_is_to_flower_what_its_own_array_is() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    ours, theirs = HeldArray(values), Array(values)
    assert (ours.dtype, ours.shape, ours.stype, ours.data) == (theirs.dtype, theirs.shape, theirs.stype, theirs.data)
    assert ours.object_id == theirs.object_id
    assert not ours.numpy().flags.writeable
    assert np.shares_memory(ours.numpy(), values)


def test_flower_inflates_a_plain_array_from_what_a_numpy_array_deflates_to() -> None:
    record = RecordDict({"parameters": array_record(flat=np.arange(9.0), other=np.arange(4))})
    contents = {key: child.deflate() for key, child in get_all_nested_objects(record).items()}
    assert get_object_tree(record).object_id == record.object_id
    inflated = inflate_object_from_contents(record.object_id, contents)
    assert isinstance(inflated, RecordDict)
    found = inflated.array_records["parameters"]["flat"]
    assert type(found) is Array
    assert np.array_equal(found.numpy(), np.arange(9.0))


def test_stored_bytes_counts_either_kind() -> None:
    record = ArrayRecord()
    record["ours"] = HeldArray(np.zeros(10, dtype=np.float32))
    assert stored_bytes(record) == 40
    record["theirs"] = Array(np.zeros(10, dtype=np.float32))
    assert stored_bytes(record) > 80
