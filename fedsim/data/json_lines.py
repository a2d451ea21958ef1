"""One line of JSON, one record: an object whose keys say each thing once."""

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

from fedsim.data.column_paths import names_within
from fedsim.data.records import MALFORMED, MARK, TWICE

ESCAPED_ANYWAY = '"\\/\b\f\n\r\t'


class LineParser:
    """Parses lines of JSON, many at once.

    Args:
        wanted: The columns that matter, or paths to them. A record that gives one of them twice, or a key on the way
            to one, has no value for it: parsers disagree on which of the two they take (RFC 8259, section 4).
    """

    def __init__(self, wanted: Collection[str]):
        self._wanted = names_within(wanted)
        self._keys = {
            column: json.dumps(column, ensure_ascii=False).encode("utf-8", "surrogateescape") for column in wanted
        }
        # How often keys on the way to a path are to be found in a line is not known beforehand.
        paths = len(self._wanted) > len(self._keys)
        self._simple = not paths and not any(letter in column for column in wanted for letter in ESCAPED_ANYWAY)
        self._careful = json.JSONDecoder(object_pairs_hook=self._object)

    def parse(self, lines: Sequence[bytes]) -> list[Any]:
        """The object on each line; TWICE where it gives a wanted key twice, MALFORMED for anything else.

        A byte-order mark before it (of a file, or of one that was appended to another) is passed over; bytes that are
        not UTF-8 become lone surrogates.
        """
        records = [_parse(line, json.loads) for line in lines]
        if self._may_repeat(lines, records):
            for place, line in enumerate(lines):
                if not self._simple or b"\\u" in line or any(line.count(key) > 1 for key in self._keys.values()):
                    records[place] = _parse(line, self._careful.decode)
        return records

    def _may_repeat(self, lines: Sequence[bytes], records: list[Any]) -> bool:
        """Whether a wanted key can be on a line twice: looking at the pairs of every object would take long.

        A key that is written more often than there are records that have it; or one that escapes may hide.
        """
        text = b"".join(lines)
        return (
            not self._simple
            or b"\\u" in text
            or any(
                text.count(key) != sum(1 for record in records if isinstance(record, dict) and column in record)
                for column, key in self._keys.items()
            )
        )

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            keys = [key for key, _ in pairs if key in self._wanted]
            if len(set(keys)) < len(keys):
                raise _Twice
        return record


def _parse(line: bytes, loads: Callable[[str], Any]) -> Any:
    try:
        record = loads(line.decode("utf-8", "surrogateescape").removeprefix(MARK))
    except _Twice:
        return TWICE
    except (ValueError, RecursionError):
        return MALFORMED
    return record if isinstance(record, dict) else MALFORMED


class _Twice(ValueError):
    """A wanted key is given twice."""
