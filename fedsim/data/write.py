"""Write a store: each column is appended to an Arrow file of its own, which can be memory-mapped when it is whole."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fedsim.data.columns import ColumnFile
from fedsim.data.shape import Examples
from fedsim.data.store import FORMAT, MANIFEST, checksum, manifest_checksum
from fedsim.rows import SizeCounts

FILES = {
    "token": "tokens.arrow",
    "scored": "scored.arrow",
    "start": "starts.arrow",
    "length": "lengths.arrow",
    "ignored_prefix": "ignored_prefixes.arrow",
    "class": "classes.arrow",
    "user_offset": "offsets.arrow",
}
"""The file of each column."""
NAMES_AT_ONCE = 1 << 20
COUNTS_AT_ONCE = 1 << 20
QUANTILES = {"minimum": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "maximum": 1.0}


class StoreWriter:
    """Appends users, in order, to a new store in a folder.

    Memory does not grow with users, rows or tokens: a column is a growing file, and is read a piece at a time.

    Args:
        folder: An empty folder; or one that an earlier writer left unfinished, with its state.
        token_type: Integer type of the tokens.
        state: What that writer's `state` returned; what it wrote afterwards is cut off.
    """

    def __init__(self, folder: Path, token_type: np.dtype, state: Mapping[str, Any] | None = None):
        self._folder = folder
        self._token_type = token_type
        self._columns: dict[str, ColumnFile] = {}
        self._last: tuple[int, ...] = ()
        self.num_users = self.num_rows = self.num_tokens = self._longest = self._largest = 0
        if state is None:
            self._put("user_offset", np.zeros(1, np.int64))
            return
        self._last = tuple(state["last"])
        self.num_users, self.num_rows, self.num_tokens = (state[name] for name in ("users", "rows", "tokens"))
        self._longest, self._largest = state["longest"], state["largest"]
        for name, (kind, length) in state["columns"].items():
            self._columns[name] = ColumnFile(folder / FILES[name], name, np.dtype(kind), length)

    def append(self, keys: np.ndarray, rows: Examples) -> np.ndarray:
        """Add users with their rows; users without rows are left out.

        Args:
            keys: uint64 [users, 2], the users' keyed hashes, above all earlier ones.
            rows: Their rows; rows.users are places in keys, ascending.

        Returns:
            bool [users]: which of them have rows and were added.
        """
        counts = np.bincount(rows.users, minlength=len(keys))
        kept = counts > 0
        if not kept.any():
            return kept
        if self._last and self._last >= tuple(keys[0].tolist()):
            raise RuntimeError("users came out of order: one of them could be in the store twice, clipped twice")
        self._last = tuple(keys[kept][-1].tolist())
        self._put("user_offset", self.num_rows + np.cumsum(counts[kept]))
        self._put("token", rows.tokens.astype(self._token_type, copy=False))
        if rows.scored is not None:
            self._put("scored", rows.scored)
        self._put("start", self.num_tokens + np.cumsum(rows.lengths) - rows.lengths)
        self._put("length", rows.lengths.astype(np.int32))
        if rows.prefixes is not None:
            self._put("ignored_prefix", rows.prefixes.astype(np.int32))
        if rows.classes is not None:
            self._put("class", rows.classes.astype(np.int32))
        self.num_users += int(kept.sum())
        self.num_rows += len(rows.lengths)
        self.num_tokens += int(rows.lengths.sum())
        self._longest = max(self._longest, int(rows.lengths.max()))
        self._largest = max(self._largest, int(rows.tokens.max(initial=0)))
        return kept

    def state(self) -> dict[str, Any]:
        """What another writer needs to go on from here, as JSON values; all that was appended is on disk then."""
        for column in self._columns.values():
            column.force()
        columns = {name: [column.kind.str, column.length] for name, column in self._columns.items()}
        counts = {"users": self.num_users, "rows": self.num_rows, "tokens": self.num_tokens, "longest": self._longest}
        counts["largest"] = self._largest
        return {"last": list(self._last), "columns": columns, **counts}

    def finish(
        self, names: pa.Table | pa.RecordBatchReader, splits: dict[str, list[int]], manifest: dict[str, Any]
    ) -> None:
        """Make the columns Arrow files, and write last of all the manifest that makes them a store.

        Args:
            names: Column "user": the users' names, in order.
            splits: First user and the user after the last, for each split.
            manifest: What else the manifest is to say.
        """
        rows_per_user = self._size_counts(0, self.num_users)
        users_by_rows = {name: self._size_counts(start, stop) for name, (start, stop) in splits.items()}
        for column in self._columns.values():
            column.close()
        if (named := _write_names(self._folder / "users.arrow", names)) != self.num_users:
            raise RuntimeError(f"{named} names for {self.num_users} users")
        files = {}
        for file in sorted(self._folder.glob("*.arrow")):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
            files[file.name] = {"bytes": file.stat().st_size, "crc32": checksum(file)}
        content = json.dumps([files, splits, manifest["classes"], manifest["tokenizer"]], sort_keys=True)
        whole = {
            "format": FORMAT,
            "fingerprint": hashlib.blake2b(content.encode(), digest_size=16).hexdigest(),
            "num_users": self.num_users,
            "num_rows": self.num_rows,
            "num_tokens": self.num_tokens,
            "rows_per_user": {name: int(rows_per_user.quantile(at)) for name, at in QUANTILES.items()},
            "splits": splits,
            "users_by_rows": {name: _told(counts) for name, counts in users_by_rows.items()},
            "longest_row": self._longest,
            "largest_token": self._largest,
            "files": files,
            **manifest,
        }
        with (self._folder / MANIFEST).open("w", encoding="utf-8") as told:
            json.dump(whole | {"crc32": manifest_checksum(whole)}, told, indent=2, ensure_ascii=False)
            told.flush()
            os.fsync(told.fileno())

    def _put(self, name: str, values: np.ndarray) -> None:
        if name not in self._columns:
            self._columns[name] = ColumnFile(self._folder / FILES[name], name, values.dtype)
        self._columns[name].append(values)

    def _size_counts(self, start: int, stop: int) -> SizeCounts:
        """How many of these users own how many rows, from offsets that are mapped a piece at a time."""
        pieces = []
        for begin in range(start, stop, COUNTS_AT_ONCE):
            offsets = self._columns["user_offset"].values()[begin : min(begin + COUNTS_AT_ONCE, stop) + 1]
            pieces.append(SizeCounts.counted(np.diff(offsets)))
        return SizeCounts.joined(pieces)


def _told(counts: SizeCounts) -> dict[str, int]:
    """How many users own how many rows, for a manifest: by the number of rows, ascending."""
    return dict(zip(map(str, counts.sizes.tolist()), counts.users.tolist(), strict=True))


def _write_names(path: Path, names: pa.Table | pa.RecordBatchReader) -> int:
    """The names in record batches of one size, however they come; returns how many."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, names.schema) as writer:
        named = 0
        for batch in _even_batches(names.to_batches() if isinstance(names, pa.Table) else names, names.schema):
            writer.write_batch(batch)
            named += len(batch)
    return named


def _even_batches(batches: Any, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    waiting = schema.empty_table()
    for batch in batches:
        waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch])])
        while len(waiting) >= NAMES_AT_ONCE:
            yield waiting.slice(0, NAMES_AT_ONCE).combine_chunks().to_batches()[0]
            waiting = waiting.slice(NAMES_AT_ONCE)
    if len(waiting):
        yield waiting.combine_chunks().to_batches()[0]
