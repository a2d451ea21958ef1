"""Second pass over the data: examples grouped by user, larger than memory, by DuckDB's external sort."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedsim.data.shape import Examples
from fedsim.data.user_ids import canonical_id
from fedsim.errors import InvalidInput

EXAMPLES_AT_ONCE = 1 << 16
LONG_TEXT = 16
"""Tokens from which on it says something that users share a text: shorter ones coincide by chance."""
MANY_USERS = 3
SHOWN = 3
"""Ids of a kind that are named."""
MOST_CLASSES = 10_000


class GroupedParts:
    """The parts that `spool` wrote, user by user in the order of the users' keyed hashes.

    Args:
        folder: The parts.
        scratch: Folder for what does not fit in memory.
        memory_limit: Memory that the sort may take ("1GB").
        token_type: Integer type of the tokens.
        label_names: All classes, in order; by default those there are.
    """

    def __init__(
        self, folder: Path, scratch: Path, memory_limit: str, token_type: np.dtype, label_names: Sequence[str] = ()
    ):
        # Here, because a store that is there already does without.
        import duckdb

        self._connection = duckdb.connect()
        settings = {
            "memory_limit": memory_limit,
            "temp_directory": str(scratch),
            "preserve_insertion_order": False,
            # Each thread of the sort holds buffers of its own: more threads need more memory, and disks are few.
            "threads": 2,
        }
        for name, value in settings.items():
            self._connection.execute(f"SET {name} = ?", [value])
        # In a notebook DuckDB refuses to be told where the package that would draw the bar is missing.
        if self._connection.execute("SELECT current_setting('enable_progress_bar')").fetchall() == [(True,)]:
            self._connection.execute("SET enable_progress_bar = false")
        self._examples = f"read_parquet({_quoted(folder / 'examples-*.parquet')})"
        self._users = f"read_parquet({_quoted(folder / 'users-*.parquet')})"
        self._token_type = token_type
        described = self._connection.execute(f"DESCRIBE SELECT * FROM {self._examples}").fetchall()
        self._columns = [column[0] for column in described]
        self.classes = self._classes(label_names) if "label" in self._columns else []

    def __enter__(self) -> "GroupedParts":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def batches(self) -> Iterator[tuple[np.ndarray, Examples]]:
        """Whole users at a time.

        Yields:
            (keys uint64 [users, 2] ascending, their examples in the order of the data).
        """
        extra = [column for column in ("prefix", "scored", "label") if column in self._columns]
        names = ", ".join(["high", "low", "tokens", *extra])
        query = self._connection.sql(f"SELECT {names} FROM {self._examples} ORDER BY high, low, ordinal")
        waiting: list[pa.RecordBatch] = []
        for batch in query.to_arrow_reader(EXAMPLES_AT_ONCE):
            last = _last_user(batch)
            if last:
                yield self._examples_of([*waiting, batch.slice(0, last)])
                waiting = []
            elif waiting and _key(waiting[-1], len(waiting[-1]) - 1) != _key(batch, 0):
                yield self._examples_of(waiting)
                waiting = []
            waiting.append(batch.slice(last))
        if waiting:
            yield self._examples_of(waiting)

    def user_names(self, keys: np.ndarray) -> pa.Table:
        """The names of the users with these keys, in the same order; column "user"."""
        kept = pa.table({"place": np.arange(len(keys)), "high": keys[:, 0], "low": keys[:, 1]})
        self._connection.register("kept", kept)
        names = f"SELECT high, low, min(user) AS user FROM {self._users} GROUP BY high, low"
        query = f"SELECT user FROM kept JOIN ({names}) USING (high, low) ORDER BY place"
        return self._connection.sql(query).to_arrow_table()

    def similar_users(self) -> dict[str, dict[str, Any]]:
        """Ids that may be one person's: which differ only as `normal_form` does away with, and as `loose_form` does.

        Returns:
            For each of "blanks or accents" and "case or leading zeros" that occurs: how many "users", in how many
            "groups", and "examples" of such groups. Users whom the former would make one count as one in the latter.
        """
        normal, loose = "coalesce(normal, user)", "coalesce(loose, normal, user)"
        found = {}
        for kind, form, id in (("blanks or accents", normal, "user"), ("case or leading zeros", loose, normal)):
            groups = (
                f"SELECT count(DISTINCT {id}) AS users, min({id}) AS one, max({id}) AS another "
                f"FROM {self._users} GROUP BY {form} HAVING users > 1"
            )
            query = f"SELECT sum(users), count(*), arg_min([one, another], one, {SHOWN}) FROM ({groups})"
            users, count, examples = self._connection.sql(query).fetchall()[0]
            if count:
                found[kind] = {"users": int(users), "groups": count, "examples": examples}
        return found

    def joint_users(self) -> dict[str, Any]:
        """Ids such as "ann;bob" or "ann & bob" of which a part is itself a user: how many, and a few of them."""
        parts = r"unnest(regexp_split_to_array(user, '\s*[;|,&]\s*'))"
        query = (
            f"WITH names AS (SELECT DISTINCT user FROM {self._users}), "
            f"parts AS (SELECT user, {parts} AS part FROM names WHERE regexp_matches(user, '[;|,&]')), "
            "joint AS (SELECT DISTINCT parts.user FROM parts JOIN names ON parts.part = names.user) "
            f"SELECT count(*), arg_min(user, user, {SHOWN}) FROM joint"
        )
        count, examples = self._connection.sql(query).fetchall()[0]
        return {"users": count, "examples": examples} if count else {}

    def shared_texts(self) -> dict[str, int]:
        """Texts of LONG_TEXT tokens and more that MANY_USERS users and more have word for word.

        Returns:
            How many such "texts" there are, in how many "examples", and the "most_users" that have one; empty for
            none.
        """
        of_user = (
            f"SELECT hash(tokens) AS text, count(*) AS examples FROM {self._examples} "
            f"WHERE octet_length(tokens) >= {LONG_TEXT * self._token_type.itemsize} GROUP BY text, high, low"
        )
        shared = (
            f"SELECT count(*) AS users, sum(examples) AS examples FROM ({of_user}) "
            f"GROUP BY text HAVING users >= {MANY_USERS}"
        )
        row = self._connection.sql(f"SELECT count(*), sum(examples), max(users) FROM ({shared})").fetchall()[0]
        return dict(zip(("texts", "examples", "most_users"), map(int, row), strict=True)) if row[0] else {}

    def _classes(self, given: Sequence[str]) -> list[str]:
        rows = self._connection.execute(f"SELECT DISTINCT label FROM {self._examples}").fetchall()
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

    def _examples_of(self, batches: list[pa.RecordBatch]) -> tuple[np.ndarray, Examples]:
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
        return keys[begins], examples


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


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"
