import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fedsim.data.columns import ColumnFile


def mapped(path: Path) -> np.ndarray:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    assert reader.num_record_batches == 1
    return reader.get_batch(0).column("x").to_numpy(zero_copy_only=True)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.int32, np.int64])
@pytest.mark.parametrize("count", [1, 7, 64, 100_003])
def test_a_column_is_the_file_that_arrow_would_write(tmp_path: Path, kind: type, count: int) -> None:
    values = np.arange(count).astype(kind)
    column = ColumnFile(tmp_path / "x.arrow", "x", np.dtype(kind))
    for part in np.array_split(values, 3):
        column.append(part)
    assert column.values().tolist() == values.tolist()
    column.close()
    arrow = io.BytesIO()
    batch = pa.RecordBatch.from_arrays([pa.array(values)], names=["x"])
    with pa.ipc.new_file(arrow, batch.schema) as writer:
        writer.write_batch(batch)
    assert (tmp_path / "x.arrow").read_bytes() == arrow.getvalue()
    assert mapped(tmp_path / "x.arrow").tolist() == values.tolist()


@pytest.mark.parametrize("closed", [False, True])
def test_another_process_goes_on_behind_the_values_that_stay(tmp_path: Path, closed: bool) -> None:
    path, kind = tmp_path / "x.arrow", np.dtype(np.int64)
    first = ColumnFile(path, "x", kind)
    first.append(np.arange(100))
    first.force()
    first.append(np.full(50, -1))
    if closed:
        first.close()
    second = ColumnFile(path, "x", kind, 100)
    second.append(np.arange(100, 120))
    second.close()
    assert mapped(path).tolist() == list(range(120))


def test_values_that_were_lost_are_missed(tmp_path: Path) -> None:
    column = ColumnFile(tmp_path / "x.arrow", "x", np.dtype(np.int64))
    column.append(np.arange(10))
    column.force()
    with pytest.raises(RuntimeError, match="has lost values"):
        ColumnFile(tmp_path / "x.arrow", "x", np.dtype(np.int64), 11)


def test_a_column_may_have_more_values_than_32_bits_count(tmp_path: Path) -> None:
    path, more = tmp_path / "x.arrow", 2**32 + 5
    column = ColumnFile(path, "x", np.dtype(np.uint8))
    column.append(np.array([3], np.uint8))
    column.force()
    os.truncate(path, path.stat().st_size - 1 + more)  # zeros that take no room
    column = ColumnFile(path, "x", np.dtype(np.uint8), more)
    column.append(np.array([7], np.uint8))
    column.close()
    values = mapped(path)
    assert (len(values), values[0], values[-2], values[-1]) == (more + 1, 3, 0, 7)
