"""Records as they come out of a source, before anything about them is trusted."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

POSITIONS_KEPT = 5
MARK = "\ufeff"
"""A byte-order mark: it belongs to a file, not to what is in it."""


@dataclass(frozen=True)
class Malformed:
    """Stands for every value of a record that is none, and says why."""

    reason: str


class BadRecord(Exception):
    """Why a record is left out, in a few words that are the same for all such records."""


MALFORMED = Malformed("cannot be parsed")
TWICE = Malformed("a key given twice")
FIELDS = Malformed("more or fewer fields than the header")
JOINED = "every line could be a record by itself"
"""What is doubtful about a record of several lines."""
QUOTES = Malformed("quotes that do not match (where they are letters like others: --data.quotes none)")
FOREIGN = Malformed("file without the columns")
"""Stands for a whole file that lies beside the data and holds none of its columns."""


@dataclass(frozen=True)
class Astray:
    """Stands for what a path leads to in a record that has the column it begins with, and nothing there.

    Nobody is named by it where owners are asked for, and yet somebody may be meant; elsewhere it is a missing value.
    """


ASTRAY = Astray()


@dataclass(frozen=True, kw_only=True)
class Records:
    """Neighbouring records of one file.

    Attributes:
        columns: For each column asked for, one value a record: None where it is missing, ASTRAY where a path to it
            leads nowhere, MALFORMED in every column where the record could not be parsed, bytes that are not UTF-8 as
            lone surrogates (PEP 383).
        origin: Name of the file or split, to be shown.
        first: Number of the first record in it, as shown to people (line or row, from 1).
        done: How much of the source has been read, in the unit of its total.
        numbers: The number of each record, where they do not follow one another (the line where each begins).
        joined: Places, from 0, of records that may be several, made one by two stray quotes (see `delimited.Joined`).
    """

    columns: Mapping[str, Sequence[Any]]
    origin: str
    first: int
    done: float = 0.0
    numbers: Sequence[int] | None = None
    joined: Collection[int] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def position(self, place: int) -> str:
        """Where a record is, for people: file and line or row."""
        return f"{self.origin}:{self.first + place if self.numbers is None else self.numbers[place]}"


@dataclass
class Tally:
    """Records by what is wrong with them, or doubtful: how many, and where the first few are."""

    counts: dict[str, int] = field(default_factory=dict)
    positions: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, position: str, count: int = 1) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        kept = self.positions.setdefault(reason, [])
        if len(kept) < POSITIONS_KEPT:
            kept.append(position)

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add what to_json described, as read earlier in the data or later."""
        for reason, entry in other.items():
            self.counts[reason] = self.counts.get(reason, 0) + entry["count"]
            kept = self.positions.setdefault(reason, [])
            kept.extend(entry["first"][: POSITIONS_KEPT - len(kept)])

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def in_words(self) -> str:
        """Each reason with its count and the first place; empty where nothing was counted."""
        return "; ".join(
            f"{count:,} × {reason} (first: {self.positions[reason][0]})"
            for reason, count in sorted(self.counts.items())
        )

    def to_json(self) -> dict[str, Any]:
        return {
            reason: {"count": count, "first": self.positions[reason]} for reason, count in sorted(self.counts.items())
        }


def in_parts(records: Iterator[Records], most_records: int, most_characters: int) -> Iterator[list[Records]]:
    """Neighbouring records gathered into parts of about one size; where they are cut depends on the data alone."""
    part: list[Records] = []
    count, characters = 0, 0
    for chunk in records:
        part.append(chunk)
        count += len(chunk)
        characters += sum(map(_characters, chunk.columns.values()))
        if count >= most_records or characters >= most_characters:
            yield part
            part, count, characters = [], 0, 0
    if part:
        yield part


def _characters(value: Any) -> int:
    """Characters of the text in a value, however deep it lies: a conversation's in its messages."""
    if type(value) is str:
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return sum(len(item) if type(item) is str else _characters(item) for item in value)
    return 0
