"""Second pass over the data: examples grouped by user, larger than memory, by DuckDB's external sort."""

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedsim.data.machine import cores, memory_bytes
from fedsim.data.shape import Examples
from fedsim.data.sources import Progress
from fedsim.data.user_ids import canonical_id
from fedsim.errors import Failure, InvalidInput

EXAMPLES_AT_ONCE = 1 << 16
BYTES_AT_ONCE = 1 << 25
THREAD_BYTES = 125_000_000
"""What a thread of DuckDB's needs for buffers of its own."""
PATTERN = re.compile(r"[*?\[]")
"""What DuckDB takes for more than itself in a path."""
LONG_TEXT = 16
"""Tokens from which on it says something that users share a text: shorter ones coincide by chance."""
MANY_USERS = 3
MOST_CLASSES = 10_000
SECONDS_BETWEEN_LOOKS = 0.5
MEDDLED = (
    "The parts of this data hold {found:,} examples where {examples:,} were written: something else wrote there. "
    "Remove {folder} and prepare the data again."
)


@dataclass(frozen=True, kw_only=True)
class UserBatch:
    """Whole users.

    Attributes:
        keys: uint64 [users, 2], ascending: their keyed hashes.
        names: string [users].
        examples: Theirs, in the order of the data.
    """

    keys: np.ndarray
    names: pa.Array
    examples: Examples


class GroupedParts:
    """The parts that `spool` wrote, user by user in the order of the users' keyed hashes.

    Args:
        files: The parts.
        examples: How many they hold, to the knowledge of whoever wrote them.
        scratch: Folder for what does not fit in memory.
        memory_limit: Memory that the sort may take ("1GB"); as many threads take part as it has room for.
        token_type: Integer type of the tokens.
        label_names: All classes, in order; by default those there are.

    Raises:
        Failure: They hold more or fewer.
    """

    def __init__(
        self,
        files: Sequence[Path],
        examples: int,
        scratch: Path,
        memory_limit: str,
        token_type: np.dtype,
        label_names: Sequence[str] = (),
    ):
        # Here, because a store that is there already does without.
        import duckdb

        self.connection = duckdb.connect()
        settings = {
            "memory_limit": memory_limit,
            "temp_directory": str(scratch),
            "preserve_insertion_order": False,
            "threads": max(1, min(cores(), memory_bytes(memory_limit) // THREAD_BYTES)),
        }
        for name, value in settings.items():
            self.connection.execute(f"SET {name} = ?", [value])
        # How far a query is it only knows where it could draw a bar. In a notebook that lacks a package it refuses
        # even to be told not to.
        with suppress(duckdb.Error):
            self.connection.execute("SET enable_progress_bar_print = false")
            self.connection.execute("SET enable_progress_bar = true")
        self._examples = table_of(files)
        self._token_type = token_type
        described = self.connection.execute(f"DESCRIBE SELECT * FROM {self._examples}").fetchall()
        self._columns = [column[0] for column in described]
        size = sum(file.stat().st_size for file in files)
        found = self.connection.execute(f"SELECT count(*) FROM {self._examples}").fetchall()[0][0]
        if found != examples:
            self.connection.close()
            raise Failure(MEDDLED.format(found=found, examples=examples, folder=scratch.parent))
        self._at_once = max(1, min(EXAMPLES_AT_ONCE, BYTES_AT_ONCE * examples // size))
        self.classes = self._classes(label_names) if "label" in self._columns else []

    def __enter__(self) -> "GroupedParts":
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def batches(self, progress: Progress, after: tuple[int, int] | None = None) -> Iterator[UserBatch]:
        """Whole users at a time.

        Args:
            progress: Told how far the sort is that comes before the first.
            after: Only users whose keys are above this one.
        """
        extra = [column for column in ("prefix", "scored", "label") if column in self._columns]
        names = ", ".join(["high", "low", "user", "tokens", *extra])
        above = f" WHERE (high, low) > ({after[0]}::UBIGINT, {after[1]}::UBIGINT)" if after else ""
        query = self.connection.sql(f"SELECT {names} FROM {self._examples}{above} ORDER BY high, low, ordinal")
        with self._watched("Sorting by user", progress):
            reader = query.to_arrow_reader(self._at_once)
        waiting: list[pa.RecordBatch] = []
        for batch in reader:
            last = _last_user(batch)
            if last:
                yield self._users_of([*waiting, batch.slice(0, last)])
                waiting = []
            elif waiting and _key(waiting[-1], len(waiting[-1]) - 1) != _key(batch, 0):
                yield self._users_of(waiting)
                waiting = []
            waiting.append(batch.slice(last))
        if waiting:
            yield self._users_of(waiting)

    def shared_texts(self) -> dict[str, int]:
        """Texts of LONG_TEXT tokens and more that MANY_USERS users and more have word for word.

        Returns:
            How many such "texts" there are, in how many "examples", and the "most_users" that have one; empty for
            none.
        """
        long = f"octet_length(tokens) >= {LONG_TEXT * self._token_type.itemsize}"
        # Hashes first, which take little room: hardly any text is there so often, whoever has it.
        often = (
            f"SELECT hash(tokens) AS text FROM {self._examples} WHERE {long} "
            f"GROUP BY text HAVING count(*) >= {MANY_USERS}"
        )
        of_user = (
            f"SELECT hash(tokens) AS text, count(*) AS examples FROM {self._examples} "
            f"WHERE {long} AND hash(tokens) IN ({often}) GROUP BY text, high, low"
        )
        shared = (
            f"SELECT count(*) AS users, sum(examples) AS examples FROM ({of_user}) "
            f"GROUP BY text HAVING users >= {MANY_USERS}"
        )
        row = self.connection.sql(f"SELECT count(*), sum(examples), max(users) FROM ({shared})").fetchall()[0]
        return dict(zip(("texts", "examples", "most_users"), map(int, row), strict=True)) if row[0] else {}

    @contextmanager
    def _watched(self, what: str, progress: Progress) -> Iterator[None]:
        """While a query runs, tell how far it is, as far as DuckDB knows."""
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(SECONDS_BETWEEN_LOOKS):
                progress(what, max(0.0, min(99.0, self.connection.query_progress())), 100)

        progress(what, 0, 100)
        watch = threading.Thread(target=look, daemon=True)
        watch.start()
        try:
            yield
        finally:
            ended.set()
            watch.join()
        progress(what, 100, 100)

    def _classes(self, given: Sequence[str]) -> list[str]:
        rows = self.connection.execute(f"SELECT DISTINCT label FROM {self._examples}").fetchall()
        names = [row[0] for row in rows]
        if len(names) > MOST_CLASSES:
            raise InvalidInput(
                "data.label-column", f"{len(names)} different labels", f"at most {MOST_CLASSES} classes"
            )
        if given:
            known = [canonical_id(name, "label") for name in given]
            if unknown := sorted(set(names) - set(known)):
                few = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
                hint = f"The data also has {few}: name all classes, or leave these examples out."
                raise InvalidInput("data.label-names", " ".join(given), "all labels in the data", hint)
            return known
        numeric = all(name.lstrip("-").isdecimal() for name in names)
        return sorted(names, key=int) if numeric else sorted(names)

    def _users_of(self, batches: list[pa.RecordBatch]) -> UserBatch:
        table = pa.Table.from_batches(batches).combine_chunks()
        keys = np.stack([table[name].to_numpy() for name in ("high", "low")], axis=1)
        begins = np.ones(len(keys), dtype=bool)
        begins[1:] = (keys[1:] != keys[:-1]).any(axis=1)
        data, lengths = _ragged(table["tokens"])
        classes = None
        if self.classes:
            classes = pc.index_in(table["label"], pa.array(self.classes)).to_numpy().astype(np.int32)
        examples = Examples(
            tokens=np.frombuffer(data, self._token_type),
            lengths=lengths // self._token_type.itemsize,
            users=np.cumsum(begins) - 1,
            prefixes=table["prefix"].to_numpy().astype(np.int64) if "prefix" in self._columns else None,
            scored=_ragged(table["scored"])[0] if "scored" in self._columns else None,
            classes=classes,
        )
        names = table["user"].take(pa.array(np.flatnonzero(begins))).combine_chunks()
        return UserBatch(keys=keys[begins], names=names, examples=examples)


def table_of(files: Sequence[Path]) -> str:
    """Parquet files as a table in SQL, of what is in them alone: names of folders are neither columns nor patterns."""
    escaped = (PATTERN.sub(r"[\g<0>]", str(file)).replace("'", "''") for file in files)
    listed = ", ".join(f"'{file}'" for file in escaped)
    return f"read_parquet([{listed}], hive_partitioning = false)"


def _ragged(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a column of binary values end to end, uint8, and how many each has, int64."""
    values = column.cast(pa.large_binary()).combine_chunks()
    values = values.chunk(0) if isinstance(values, pa.ChunkedArray) else values
    if not len(values):
        return np.empty(0, np.uint8), np.empty(0, np.int64)
    ends = np.frombuffer(values.buffers()[1], np.int64)[values.offset : values.offset + len(values) + 1]
    return np.frombuffer(values.buffers()[2], np.uint8)[ends[0] : ends[-1]], np.diff(ends)


def _key(batch: pa.RecordBatch, place: int) -> tuple[int, int]:
    return batch["high"][place].as_py(), batch["low"][place].as_py()


def _last_user(batch: pa.RecordBatch) -> int:
    """Where the rows of the batch's last user begin."""
    high, low = batch["high"].to_numpy(), batch["low"].to_numpy()
    others = np.flatnonzero((high != high[-1]) | (low != low[-1]))
    return int(others[-1]) + 1 if len(others) else 0
