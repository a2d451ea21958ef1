"""The users of the data by name, on disk: their names for the store, and which of them may be one person."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedsim.data.group import table_of
from fedsim.data.owners import BEGINS, owners_in
from fedsim.data.part import write_parquet
from fedsim.data.user_ids import loose_form, normal_form

FILES = "users-*.parquet"
SHOWN = 3
"""Ids of a kind that are named."""
USERS_AT_ONCE = 1 << 16


class NamedUsers:
    """Users, each once, in the order in which they are added: batch by batch, a file each.

    Args:
        folder: Where the files are.
        number: Files that stay, of an earlier process; those behind them are removed.
    """

    def __init__(self, folder: Path, number: int = 0):
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self.number = number
        """Files so far."""
        for file in self._files()[number:]:
            file.unlink()

    def append(self, names: pa.Array, kept: np.ndarray) -> None:
        """Add users.

        Args:
            names: string [users].
            kept: bool [users]: which of them are in the store.
        """
        users = names.to_pylist()
        # Of a set of owners each is one of those who may be one person, and none of those in the store.
        owners = sorted({owner for user in users if user.startswith(BEGINS) for owner in owners_in(user)})
        users += owners
        columns: dict[str, Any] = {
            "user": pa.array(users, pa.string()),
            "kept": [*kept.tolist(), *[False] * len(owners)],
        }
        for column, form_of in (("normal", normal_form), ("loose", loose_form)):
            forms = (form_of(user) for user in users)
            columns[column] = pa.array((f if f != u else None for f, u in zip(forms, users, strict=True)), pa.string())
        write_parquet(pa.table(columns), self._folder / FILES.replace("*", f"{self.number:08d}"))
        self.number += 1

    def kept(self) -> pa.RecordBatchReader:
        """Column "user": the names of those in the store, in order."""
        schema = pa.schema({"user": pa.string()})

        def batches() -> Iterator[pa.RecordBatch]:
            for file in self._files():
                table = pq.read_table(file, columns=["user", "kept"], use_threads=False)
                yield from table.filter(table["kept"]).select(["user"]).cast(schema).to_batches()

        return pa.RecordBatchReader.from_batches(schema, batches())

    def similar(self, connection: Any) -> dict[str, dict[str, Any]]:
        """Ids that may be one person's: which differ only as `normal_form` does away with, and as `loose_form` does.

        Args:
            connection: DuckDB's.

        Returns:
            For each of "blanks or accents" and "case or leading zeros" that occurs: how many "users", in how many
            "groups", and "examples" of such groups. Users whom the former would make one count as one in the latter.
        """
        normal, loose = "coalesce(normal, user)", "coalesce(loose, normal, user)"
        found = {}
        for kind, form, id in (("blanks or accents", normal, "user"), ("case or leading zeros", loose, normal)):
            # Hashes first, which take little room: hardly any two ids have a form in common.
            common = f"SELECT hash({form}) AS form FROM {self._table} GROUP BY form HAVING count(*) > 1"
            groups = (
                f"SELECT count(DISTINCT {id}) AS users, min({id}) AS one, max({id}) AS another "
                f"FROM {self._table} WHERE hash({form}) IN ({common}) GROUP BY {form} HAVING users > 1"
            )
            query = f"SELECT sum(users), count(*), arg_min([one, another], one, {SHOWN}) FROM ({groups})"
            users, count, examples = connection.sql(query).fetchall()[0]
            if count:
                found[kind] = {"users": int(users), "groups": count, "examples": examples}
        return found

    def joint(self, connection: Any) -> dict[str, Any]:
        """Ids such as "ann;bob" or "ann & bob" of which a part is itself a user: how many, and a few of them.

        Args:
            connection: DuckDB's.
        """
        parts = r"unnest(regexp_split_to_array(user, '\s*[;|,&]\s*'))"
        query = (
            f"WITH parts AS (SELECT user, {parts} AS part FROM {self._table} WHERE regexp_matches(user, '[;|,&]')), "
            f"joint AS (SELECT DISTINCT parts.user FROM parts JOIN {self._table} AS names ON parts.part = names.user) "
            f"SELECT count(*), arg_min(user, user, {SHOWN}) FROM joint"
        )
        count, examples = connection.sql(query).fetchall()[0]
        return {"users": count, "examples": examples} if count else {}

    @property
    def _table(self) -> str:
        """Of owners, not of sets of them."""
        return f"(SELECT * FROM {table_of(self._files())} WHERE NOT starts_with(user, chr({ord(BEGINS)})))"

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(FILES))
