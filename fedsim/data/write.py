"""Write a store: columns are appended to plain files, then set down as Arrow files that can be memory-mapped."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from fedsim.data.shape import Examples
from fedsim.data.store import FORMAT, MANIFEST, checksum, manifest_checksum
from fedsim.rows import SizeCounts

FILES = {
    "token": "tokens.arrow",
    "scored": "tokens.arrow",
    "start": "rows.arrow",
    "length": "rows.arrow",
    "ignored_prefix": "rows.arrow",
    "class": "rows.arrow",
    "user_offset": "offsets.arrow",
}
BLOCK = 1 << 24
QUANTILES = {"minimum": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "maximum": 1.0}


class StoreWriter:
    """Appends users, in order, to a new store in an empty folder.

    Memory does not grow with rows or tokens: a column is a growing file, copied when it becomes part of an Arrow file.
    """

    def __init__(self, folder: Path, token_type: np.dtype):
        self._folder = folder
        self._types = {"token": token_type}
        self._open: dict[str, Any] = {}
        self._rows_per_user: list[np.ndarray] = []
        self._keys: list[np.ndarray] = []
        self.num_rows = 0
        self.num_tokens = 0
        self._longest = 0

    def append(self, keys: np.ndarray, rows: Examples) -> None:
        """Add users with their rows; users without rows are left out.

        Args:
            keys: uint64 [users, 2], the users' keyed hashes, above all earlier ones.
            rows: Their rows; rows.users are places in keys, ascending.
        """
        if not len(rows.lengths):
            return
        owners, counts = np.unique(rows.users, return_counts=True)
        if self._keys and tuple(self._keys[-1][-1]) >= tuple(keys[0]):
            raise RuntimeError("users came out of order: one of them could be in the store twice, clipped twice")
        self._keys.append(keys[owners])
        self._rows_per_user.append(counts)
        self._put("token", rows.tokens.astype(self._types["token"], copy=False))
        if rows.scored is not None:
            self._put("scored", rows.scored)
        self._put("start", self.num_tokens + np.cumsum(rows.lengths) - rows.lengths)
        self._put("length", rows.lengths.astype(np.int32))
        if rows.prefixes is not None:
            self._put("ignored_prefix", rows.prefixes.astype(np.int32))
        if rows.classes is not None:
            self._put("class", rows.classes.astype(np.int32))
        self.num_rows += len(rows.lengths)
        self.num_tokens += int(rows.lengths.sum())
        self._longest = max(self._longest, int(rows.lengths.max()))

    @property
    def keys(self) -> np.ndarray:
        """uint64 [users, 2]: keyed hashes of the users so far, ascending."""
        return np.concatenate(self._keys) if self._keys else np.empty((0, 2), np.uint64)

    def finish(self, names: pa.Table, splits: dict[str, list[int]], manifest: dict[str, Any]) -> None:
        """Write the Arrow files, and last of all the manifest that makes them a store.

        Args:
            names: Column "user": the users' names, in order.
            splits: First user and the user after the last, for each split.
            manifest: What else the manifest is to say.
        """
        for file in self._open.values():
            file.close()
        counts = np.concatenate(self._rows_per_user)
        offsets = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=offsets[1:])
        self._put("user_offset", offsets)
        self._open["user_offset"].close()
        for name in sorted(set(FILES.values())):
            columns = {column: self._types[column] for column in self._open if FILES[column] == name}
            _write_arrow(self._folder / name, {self._raw(column): kind for column, kind in columns.items()})
        with pa.OSFile(str(self._folder / "users.arrow"), "wb") as sink, pa.ipc.new_file(sink, names.schema) as writer:
            writer.write_table(names.combine_chunks())
        for name in self._open:
            self._raw(name).unlink()
        files = {}
        for file in sorted(self._folder.glob("*.arrow")):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
            files[file.name] = {"bytes": file.stat().st_size, "crc32": checksum(file)}
        content = json.dumps([files, splits, manifest["classes"], manifest["tokenizer"]], sort_keys=True)
        whole = {
            "format": FORMAT,
            "fingerprint": hashlib.blake2b(content.encode(), digest_size=16).hexdigest(),
            "num_users": len(counts),
            "num_rows": self.num_rows,
            "num_tokens": self.num_tokens,
            "rows_per_user": {name: int(np.quantile(counts, at)) for name, at in QUANTILES.items()},
            "splits": splits,
            "users_by_rows": {name: _users_by_rows(counts[start:stop]) for name, (start, stop) in splits.items()},
            "longest_row": self._longest,
            "files": files,
            **manifest,
        }
        with (self._folder / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(whole | {"crc32": manifest_checksum(whole)}, file, indent=2, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())

    def _raw(self, name: str) -> Path:
        return self._folder / f"{name}.raw"

    def _put(self, name: str, values: np.ndarray) -> None:
        if name not in self._open:
            self._open[name] = self._raw(name).open("wb")
            self._types[name] = values.dtype
        values.tofile(self._open[name])


def _users_by_rows(counts: np.ndarray) -> dict[str, int]:
    """How many users own how many rows, for a manifest: by the number of rows, ascending."""
    found = SizeCounts.counted(counts)
    return dict(zip(map(str, found.sizes.tolist()), found.users.tolist(), strict=True))


def _write_arrow(path: Path, columns: dict[Path, np.dtype]) -> None:
    """One uncompressed Arrow IPC file with one record batch, so that each column is contiguous and can be mapped.

    Args:
        path: The file.
        columns: Plain files of values, named after the columns, and their types.
    """
    mapped = [np.memmap(column, kind, mode="r") for column, kind in columns.items()]
    arrays = [pa.Array.from_buffers(pa.from_numpy_dtype(v.dtype), len(v), [None, pa.py_buffer(v)]) for v in mapped]
    batch = pa.RecordBatch.from_arrays(arrays, names=[column.stem for column in columns])
    with path.open("wb") as file:
        sink = pa.PythonFile(_CopyingSink(file, list(columns)), mode="w")
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)


class _CopyingSink:
    """A file for Arrow to write to, which takes the columns' values from their plain files.

    Arrow would read a mapped column from end to end in one write, and the whole column would count as this process's
    memory. Copying in blocks takes a few megabytes whatever the size.
    """

    closed = False

    def __init__(self, file: BinaryIO, columns: list[Path]):
        self._file = file
        self._columns = columns

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if isinstance(data, pa.Buffer) and self._columns and size == self._columns[0].stat().st_size:
            with self._columns.pop(0).open("rb") as column:
                shutil.copyfileobj(column, self._file, BLOCK)
        else:
            self._file.write(data)
        return size

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True
