"""Records of JSON files: a record a line, one list of records, or LEAF's object of users."""

import json
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from fedsim.data import leaf
from fedsim.data.json_lines import LineParser
from fedsim.data.json_stream import AS_LINES, JsonStream
from fedsim.data.records import MALFORMED
from fedsim.data.text_streams import opened
from fedsim.errors import InvalidInput

RECORDS_AT_ONCE = 4096
BYTES_AT_ONCE = 1 << 23

Chunk = tuple[list[Any], int, int]
"""Neighbouring records, the number of the first (its line, or its place among the records, from 1), and how many bytes
of the file have been read."""


def json_records(file: Path, encoding: str, wanted: Collection[str], most: int | None = None) -> Iterator[Chunk]:
    """The records of a file, as its beginning tells which form it has.

    Args:
        file: Plain or compressed.
        encoding: See `text_streams.opened`.
        wanted: The columns that matter (see `LineParser`).
        most: Records in a chunk; None for RECORDS_AT_ONCE.

    Raises:
        InvalidInput: If the file is damaged; or it is one value, and is not JSON to its end.
    """
    form = _form(file, encoding)
    at_once = most or RECORDS_AT_ONCE
    with opened(file, encoding) as (stream, raw):
        if form == "lines":
            yield from _lines(stream, raw, LineParser(wanted), at_once)
            return
        number = 1
        for records in (
            _array(stream, file, wanted, at_once) if form == "array" else _leaf(stream, file, wanted, at_once)
        ):
            yield records, number, raw.tell()
            number += len(records)


def _form(file: Path, encoding: str) -> str:
    with opened(file, encoding) as (stream, _):
        beginning: bytes = stream.peek(1)  # type: ignore[attr-defined]
        if beginning.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")[:1] == b"[":
            return "array"
        if leaf.BEGINNING.match(beginning) and leaf.users_follow(JsonStream(stream, str(file))):
            return "leaf"
        return "lines"


def _lines(stream: BinaryIO, raw: BinaryIO, parser: LineParser, at_once: int) -> Iterator[Chunk]:
    first = 1
    while lines := list(islice(stream, at_once)):
        yield parser.parse(lines), first, raw.tell()
        first += len(lines)


def _array(stream: BinaryIO, file: Path, wanted: Collection[str], at_once: int) -> Iterator[list[Any]]:
    parser = LineParser(wanted)
    waiting: list[bytes] = []
    size, done = 0, 0

    def parsed() -> list[Any]:
        records = parser.parse(waiting)
        for place, record in enumerate(records):
            if record is MALFORMED and not _is_json(waiting[place]):
                hint = (
                    f"Item {done + place + 1:,} of its list is not JSON, and where it ends is not certain. {AS_LINES}"
                )
                raise InvalidInput("data.path", str(file), "a whole JSON value", hint)
        return records

    for element in JsonStream(stream, str(file)).elements():
        waiting.append(element)
        size += len(element)
        if len(waiting) >= at_once or size >= BYTES_AT_ONCE:
            yield parsed()
            done += len(waiting)
            waiting, size = [], 0
    if waiting:
        yield parsed()


def _leaf(stream: BinaryIO, file: Path, wanted: Collection[str], at_once: int) -> Iterator[list[Any]]:
    records = leaf.records_of(stream, str(file), wanted)
    while chunk := list(islice(records, at_once)):
        yield chunk


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return False
    return True
