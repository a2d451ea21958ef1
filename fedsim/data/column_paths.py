"""Columns by their names, and what is inside them by a path: `author.id`.

A column whose very name is `author.id` comes first; otherwise the longest beginning of a path that is a name is taken,
and the rest is looked for inside. A number is a place in a list; any other key is looked for in each of its items.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from fedsim.data.records import ASTRAY
from fedsim.errors import InvalidInput

ABSENT = object()
"""What a record gives for a path that leads nowhere."""
DEEPEST = 4
"""Levels of keys that an error lists."""
MOST_LISTED = 40
OF_ONE_NAME = "Rename all but one: whose text is whose must not be a matter of their order."


def value_of(record: Any, path: str) -> Any:
    """What a record has under a name or a path.

    Args:
        record: A mapping of column to value; mappings and lists lie inside.
        path: A column's name, or names with points between them.

    Returns:
        The value; None where nothing stands on the way to it; ABSENT where there is no such key. For a key in a list
        of mappings, a list, with None where one lacks it.
    """
    if record is None:
        return None
    if isinstance(record, list):
        return _of_list(record, path)
    if not isinstance(record, dict):
        return ABSENT
    if path in record:
        return record[path]
    for head, rest in beginnings(path):
        if head in record:
            return value_of(record[head], rest)
    return ABSENT


def beginnings(path: str) -> Iterator[tuple[str, str]]:
    """Where a path may be cut in two at a point: the longest beginning first."""
    end = path.rfind(".")
    while end > 0:
        yield path[:end], path[end + 1 :]
        end = path.rfind(".", 0, end)


def names_within(columns: Iterable[str]) -> set[str]:
    """Every name that a path to one of the columns may meet on its way, whole and in part."""
    found: set[str] = set()
    for column in columns:
        parts = column.split(".")
        found.update(".".join(parts[a:b]) for a in range(len(parts)) for b in range(a + 1, len(parts) + 1))
    return found


def paths_in(record: Mapping[str, Any], depth: int = DEEPEST) -> Iterator[str]:
    """The paths to what lies inside a record's columns, for people."""
    for name, value in record.items():
        inside = value
        while isinstance(inside, list) and inside:
            inside = inside[0]
        if isinstance(inside, dict) and depth > 1:
            for key in (*inside, *paths_in(inside, depth - 1)):
                yield f"{name}.{key}"


def values_of(records: Sequence[Any], column: str) -> list[Any]:
    """A column of records: None where one lacks it, ASTRAY where one has but its head. What is no mapping stands for
    itself (a `Malformed`)."""
    if "." not in column:
        return [record.get(column) if isinstance(record, dict) else record for record in records]
    heads = [head for head, _ in beginnings(column)]
    found = [value_of(record, column) if isinstance(record, dict) else record for record in records]
    for place in [place for place, value in enumerate(found) if value is ABSENT]:
        found[place] = ASTRAY if any(head in records[place] for head in heads) else None
    return found


def inner_values(values: Sequence[Any], path: str) -> list[Any]:
    """What lies at a path in the values of its head: ASTRAY where it leads nowhere."""
    found = (value_of(value, path) for value in values)
    return [ASTRAY if value is ABSENT else value for value in found]


def require_columns(
    wanted: Mapping[str, str],
    present: Sequence[str],
    origin: str,
    *,
    reached: Collection[str] = (),
    inside: Iterable[str] = (),
    hint: str = "",
) -> None:
    """Every wanted column is there, once, as a column or inside one.

    Args:
        wanted: Column by the option that named it ("data.user-column").
        present: The columns of the data.
        origin: Where, to be shown.
        reached: Those wanted that are paths to something.
        inside: Paths to what lies in the columns, to be shown.
        hint: What to do where one is missing.

    Raises:
        InvalidInput: Naming the option, the column, and the columns that exist.
    """
    for option, column in wanted.items():
        if (times := present.count(column)) > 1:
            allowed = f"the name of one column ({origin} has {times} of that name)"
            raise InvalidInput(option, column, allowed, OF_ONE_NAME)
        if not times and column not in reached:
            names = list(dict.fromkeys([*present, *inside]))
            columns = ", ".join(map(str, names[:MOST_LISTED])) + (", …" if len(names) > MOST_LISTED else "")
            raise InvalidInput(option, column, f"one of the columns of {origin}: {columns or '(none)'}", hint)


class ArrowPath:
    """Where in an Arrow schema a column lies, by its name or a path.

    Args:
        schema: Of the file.
        option: The option that names the column, for the error.
        column: Name or path.

    Attributes:
        head: The column that it is, or lies in; None where there is none.
        rest: The path within that; empty where it is the column.
        straight: Whether the path leads through records alone, none of whose names has a point: then a file can be
            asked for nothing else of the column.

    Raises:
        InvalidInput: If several things on the way have one name.
    """

    def __init__(self, schema: pa.Schema, option: str, column: str):
        self._option, self._column = option, column
        self.head: str | None = None
        self.rest, self.straight = "", True
        if column in schema.names:
            self.head = column
            return
        for head, rest in beginnings(column):
            if head in schema.names:
                self._require_one(schema.names, head)
                self.straight &= "." not in head
                if self._reaches(schema.field(head).type, rest):
                    self.head, self.rest = head, rest
                return

    def of(self, values: list[Any]) -> list[Any]:
        """The values at the path, from those of its head; ASTRAY where it leads nowhere."""
        return inner_values(values, self.rest) if self.rest else values

    def _reaches(self, kind: pa.DataType, path: str) -> bool:
        if pa.types.is_dictionary(kind):
            return self._reaches(kind.value_type, path)
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            self.straight = False
            first, _, rest = path.partition(".")
            if first.isdecimal():
                return not rest or self._reaches(kind.value_type, rest)
            return self._reaches(kind.value_type, path)
        if not pa.types.is_struct(kind):
            return False
        names = [field.name for field in kind]
        for head, rest in ((path, ""), *beginnings(path)):
            if head in names:
                self._require_one(names, head)
                self.straight &= "." not in head
                return not rest or self._reaches(kind.field(head).type, rest)
        return False

    def _require_one(self, names: list[str], name: str) -> None:
        if (times := names.count(name)) > 1:
            allowed = f"a path to one value ({times} are called {name!r})"
            raise InvalidInput(self._option, self._column, allowed, OF_ONE_NAME)


def paths_of(schema: pa.Schema) -> list[str]:
    """The paths to what lies inside a schema's columns, for people."""
    return [path for field in schema for path in _paths(field.name, field.type, DEEPEST)]


def _paths(name: str, kind: pa.DataType, depth: int) -> Iterator[str]:
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind) and depth > 1:
        for field in kind:
            yield f"{name}.{field.name}"
            yield from _paths(f"{name}.{field.name}", field.type, depth - 1)


def _of_list(items: list[Any], path: str) -> Any:
    first, _, rest = path.partition(".")
    if first.isdecimal():
        if int(first) >= len(items):
            return ABSENT
        return value_of(items[int(first)], rest) if rest else items[int(first)]
    found = [value_of(item, path) for item in items]
    if found and all(value is ABSENT for value in found):
        return ABSENT
    return [None if value is ABSENT else value for value in found]
