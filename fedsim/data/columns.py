"""A column on disk: appended to, value by value, where an Arrow file that can be memory-mapped has it in the end."""

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

OPTIONS = pa.ipc.IpcWriteOptions(allow_64bit=True)
"""A hundred million rows have more tokens than 32 bits can count."""


class ColumnFile:
    """One Arrow IPC file with one uncompressed record batch of one column, each value of which is written once.

    What stands before the values says how many there are, and is as long whatever it says: room is left for it, and
    it is written when the last value is there. A column that is one stretch of one file can be mapped as an array.

    Args:
        path: The file.
        name: The column's name.
        kind: Type of its values.
        length: Values that are in the file already and stay, of an earlier process; what is behind them is cut off.
    """

    def __init__(self, path: Path, name: str, kind: np.dtype, length: int = 0):
        self.path, self.name, self.kind = path, name, np.dtype(kind)
        self.length = length
        self._begin = _begin_of_values(name, self.kind)
        self._file: BinaryIO = path.open("r+b" if length else "wb")
        end = self._begin + length * self.kind.itemsize
        if length and path.stat().st_size < end:
            raise RuntimeError(f"{path} has lost values that were written to it")
        self._file.truncate(end)
        self._file.seek(end)

    def append(self, values: np.ndarray) -> None:
        """Add values, converted to the column's type."""
        self._file.write(np.ascontiguousarray(values, self.kind).data)
        self.length += len(values)

    def force(self) -> None:
        """Force all values to disk, where another process finds them however this one ends."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def values(self) -> np.ndarray:
        """The values so far, mapped; of those that are not looked at none is read."""
        self._file.flush()
        if not self.length:
            return np.empty(0, self.kind)
        return np.memmap(self.path, self.kind, mode="r", offset=self._begin, shape=(self.length,))

    def close(self) -> None:
        """Write what stands before and behind the values: the file is an Arrow file now."""
        values = self.values()
        array = pa.Array.from_buffers(pa.from_numpy_dtype(self.kind), len(values), [None, pa.py_buffer(values)])
        batch = pa.RecordBatch.from_arrays([array], names=[self.name])
        self._file.seek(0)
        sink = pa.PythonFile(_Around(self._file, values, self._begin), mode="w")
        with pa.ipc.new_file(sink, batch.schema, options=OPTIONS) as writer:
            writer.write_batch(batch)
        self._file.close()


class _Around:
    """A file for Arrow to write to that has the values already: they are passed over, and not even read."""

    closed = False

    def __init__(self, file: BinaryIO, values: np.ndarray, begin: int):
        self._file, self._begin = file, begin
        self._address = values.ctypes.data if len(values) else 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if isinstance(data, pa.Buffer) and data.address == self._address:
            if self._file.tell() != self._begin:
                raise RuntimeError("values do not begin where they were written")
            self._file.seek(size, io.SEEK_CUR)
        else:
            self._file.write(data)
        return size

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True


def _begin_of_values(name: str, kind: np.dtype) -> int:
    """Where Arrow puts the first value of such a file."""
    sink = io.BytesIO()
    batch = pa.RecordBatch.from_arrays([pa.array(np.ones(1, kind))], names=[name])
    with pa.ipc.new_file(sink, batch.schema, options=OPTIONS) as writer:
        writer.write_batch(batch)
    whole = pa.py_buffer(sink.getvalue())
    values = pa.ipc.open_file(whole).get_batch(0).column(0).buffers()[1]
    return int(values.address - whole.address)
