"""CSV and TSV by the letter of RFC 4180, where what a stray quote joined is refused, or pointed out.

A quote too few or too many makes lines part of a field that were none, or records of lines that were part of a field,
up to another quote or the end of the file. Nothing marks where. But of a line with quotes one can tell whether it is
possible *inside* a quoted field, and whether it is possible *outside* one, at the beginning of a record:

- A record waits until a line follows that is possible only outside, or the file ends well: then it was one. It is
  lost, and with it all that waits, when a line is possible only inside, or a record breaks the grammar.
- From there on lines are lost, until one that is possible only outside, and it and those after it make up enough
  records with as many fields as the header.
- Many lines without quotes, nearly all with as many fields as the header, are no text either.

So a bad quote costs the rows around it, up to the next ones with quotes. A quote in the middle of a field, on a line
without quoted fields (5" pipe), is of neither kind: a letter of a text, not of a name.

Two stray quotes can make a field that is one by the format: one begins a field, the other ends one, lines later. That
record cannot be told from a text of several lines, and is read; but where each of its lines could have been a record
by itself, the row says so (`Joined`). Lines with nothing but their end are passed over between records.
"""

import csv
import re
import sys
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, islice, pairwise
from typing import Any, cast

from fedsim.data.records import FIELDS, QUOTES, Malformed


class Joined(list[str]):
    """A row of several lines each of which, quotes taken as letters, has as many fields as the header."""


Row = list[str] | Malformed
Rows = tuple[Sequence[int], Sequence[Row]]
"""The line where each row begins, and the rows."""

LINES_AT_ONCE = 4096
LONGEST_FIELD = 1 << 16
"""Lines that a quoted field may have."""
PROOF = 8
"""Good records in a row that end being lost, if the first of them begins with a line that is possible only outside."""
QUIET_PROOF = 256
"""The same for lines without quotes alone, and what is enough of them not to wait for a quote. A text of which so many
lines have by chance as many delimiters as the header is not to be expected; a shorter run is."""
QUIET_LOSS = 16
"""What a line with another number of fields takes away from that."""
LONE_RETURN = re.compile(r"\r(?!\n?\Z)")
LETTER = "\udc0d"
"""Stands for a carriage return in the middle of a line, which pandas writes without quotes and the csv module does not
take. No text holds this one, nor do bytes that are not UTF-8 become it."""


class DelimitedReader:
    """The rows of one file.

    Args:
        lines: The file's lines, with their ends as they are. A carriage return in the middle of one is a letter.
        delimiter: What stands between fields.
        quoted: Whether fields may stand in quotes; otherwise a quote is a letter like others, and a line is a row.
        names: Columns in which a quote in the middle of an unquoted field is none of its letters.
    """

    def __init__(self, lines: Iterator[str], delimiter: str, *, quoted: bool = True, names: Collection[str] = ()):
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        self._lines = lines
        self._quoted = quoted
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        self._dialect: dict[str, Any] = {"delimiter": delimiter, "strict": True, "quoting": quoting}
        self._grammar = _Grammar(delimiter)
        self._ahead: deque[str] = deque()  # lines read from the file and not yet parsed
        self._taken: list[str] = []  # lines of the record that the parser is at
        self._letters = False  # whether carriage returns were replaced
        self._plain = False  # whether no quote is ahead
        self._number = 1  # of the next line
        self._found: tuple[list[int], list[Row]] = ([], [])
        self._waiting: tuple[list[int], list[Row]] = ([], [])
        self._long = False  # whether a record of several lines waits
        self._lost = False
        self._proven = False  # whether what waits began with a line that is possible only outside
        self._run = 0  # of records with as many fields as the header
        self._broken_at = 0  # the line that broke a record, and may have been part of its text
        self.header = self._read_header()
        self._names = [place for place, column in enumerate(self.header) if column in names]

    def rows(self) -> Iterator[Rows]:
        """The rows after the header, in order: fields as many as the header has, or what is wrong with a line.

        Where quotes do not match, each line is a row of its own.
        """
        while self._ahead or self._fill():
            if self._sure:
                self._read_at_once()
                self._read_with_care(self._number + len(self._ahead))
            else:
                self._read_with_care(self._number)
            if self._found[0]:
                yield self._restored()
        self._settle(good=not self._lost)
        if self._found[0]:
            yield self._restored()

    @property
    def _sure(self) -> bool:
        return not self._lost and not self._waiting[0]

    def _fill(self) -> bool:
        """Have lines at hand; False at the end of the file."""
        lines = list(islice(self._lines, LINES_AT_ONCE))
        text = "".join(lines)
        if text.count("\r") > text.count("\r\n"):
            self._letters = True
            lines = [LONE_RETURN.sub(LETTER, line) for line in lines]
        self._plain = '"' not in text and (self._plain or not self._ahead)
        self._ahead.extend(lines)
        return bool(self._ahead)

    def _restored(self) -> Rows:
        """What was found, with its carriage returns."""
        (numbers, rows), self._found = self._found, ([], [])
        if self._letters:
            rows = [
                row if isinstance(row, Malformed) else type(row)(v.replace(LETTER, "\r") for v in row) for row in rows
            ]
        return numbers, rows

    def _read_header(self) -> list[str]:
        try:
            header = next(filter(None, csv.reader(self, **self._dialect)), [])
        except csv.Error:
            header = []
        self._number += len(self._taken)
        self._taken = []
        return header

    def _read_at_once(self) -> None:
        """Take the records at hand that are beyond doubt, if all is well with them; only while nothing waits."""
        lines = list(self._ahead)
        rows: list[list[str]] = []
        begins: Sequence[int] = range(len(lines) + 1)
        if self._quoted and not self._plain:
            begins = [0]
            reader = csv.reader(lines, **self._dialect)
            with suppress(csv.Error):  # something is wrong there, or a record goes on after these lines
                for row in reader:
                    rows.append(row)
                    begins.append(reader.line_num)
            good = cast(re.Match[str], self._grammar.records.match("".join(lines))).end()
            whole = bisect_left(begins, bisect_right(list(accumulate(map(len, lines))), good))
        else:
            rows = list(csv.reader(lines, **self._dialect))
            whole = len(rows)
        kept = whole if not self._quoted else self._beyond_doubt(lines, begins, rows[:whole])
        self._take(lines, rows[:kept], begins[: kept + 1])

    def _beyond_doubt(self, lines: list[str], begins: Sequence[int], rows: list[list[str]]) -> int:
        """How many of the whole records at the front no line can contradict that is still to come."""
        quiet = 0
        for place in range(len(rows) - 1, -1, -1):
            line = lines[begins[place]]
            if '"' in line or begins[place + 1] - begins[place] > 1:
                if self._only_outside(line):
                    return place
                quiet = -len(lines)  # a run that says something begins after the last quote
            if rows[place]:
                quiet += 1 if len(rows[place]) == len(self.header) else -QUIET_LOSS
            if quiet >= QUIET_PROOF:
                return len(rows)
        return 0

    def _take(self, lines: list[str], rows: list[list[str]], begins: Sequence[int]) -> None:
        if all(len(row) == len(self.header) for row in rows):
            self._found[0].extend(map(self._number.__add__, begins[:-1]))
            if begins[-1] > len(rows):
                delimiter, others = self._dialect["delimiter"], len(self.header) - 1
                for place, (begin, end) in enumerate(pairwise(begins)):
                    # The last line tells most of them, and sooner than all.
                    if end > begin + 1 and lines[end - 1].count(delimiter) == others:
                        rows[place] = self._marked(rows[place], lines[begin:end])
            self._found[1].extend(rows)
        else:
            for row, begin, end in zip(rows, begins, begins[1:], strict=False):
                self._put(self._found, row, self._number + begin, lines[begin:end])
        self._number += begins[-1]
        for _ in range(begins[-1]):
            self._ahead.popleft()

    def _put(self, where: tuple[list[int], list[Row]], row: list[str] | None, number: int, lines: list[str]) -> None:
        """Add a row, or a bad one for each of its lines; nothing for a line with nothing on it."""
        if row == []:
            if len(self.header) > 1:
                return
            row = [""]
        if row is None or len(row) != len(self.header):
            where[0].extend(range(number, number + len(lines)))
            where[1].extend([FIELDS] * len(lines))
        else:
            where[0].append(number)
            where[1].append(self._marked(row, lines))

    def _marked(self, row: list[str], lines: list[str]) -> list[str]:
        """A row, joined where each of its lines that is not empty has as many fields, quotes taken as letters."""
        delimiter, others = self._dialect["delimiter"], len(row) - 1
        alike = len(lines) > 1 and all(line.count(delimiter) == others for line in lines if line.strip("\r\n"))
        return Joined(row) if alike else row

    def _only_outside(self, line: str) -> bool:
        """Whether a line can be nothing but the beginning of a record."""
        inside, outside = self._grammar.inside, self._grammar.outside
        return '"' in line and bool(outside.fullmatch(line)) and not inside.fullmatch(line)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """The next line for the parser, noted as part of the record that it is at."""
        if len(self._taken) >= LONGEST_FIELD or not (self._ahead or self._fill()):
            raise StopIteration
        self._taken.append(self._ahead.popleft())
        return self._taken[-1]

    def _read_with_care(self, end: int) -> None:
        """Record by record, to this line at least, and on to where nothing waits."""
        while self._ahead and (self._number < end or not self._sure):
            line, number = self._ahead[0], self._number
            if not self._quoted or '"' not in line:
                self._read_record()
                continue
            inside, outside = self._grammar.inside.fullmatch(line), self._grammar.outside.fullmatch(line)
            if outside and not inside and number != self._broken_at:
                if self._lost and not self._proven:
                    self._proven, self._run = True, 0
                elif not self._lost:
                    self._settle(good=True)
                    if number >= end:
                        break
                self._read_record()
            elif self._lost or (inside and not outside) or (self._long and not outside):
                self._refuse([self._ahead.popleft()])
                self._lost = True
                # Possible only inside: so it was inside, and where the field ends with the line, that is over.
                self._proven = bool(
                    inside and not outside and inside["closed"] is not None and number != self._broken_at
                )
            else:
                self._read_record()

    def _read_record(self) -> None:
        try:
            row = next(csv.reader(self, **self._dialect), None)
        except csv.Error:
            row = None
        lines, self._taken = self._taken, []
        several = len(lines) > 1
        strays = self._quoted and '"' in lines[0] and not self._grammar.record.fullmatch("".join(lines))
        if row is None or (strays and not self._grammar.letters.fullmatch("".join(lines))):
            # Whether the first line broke the record or the last (a quote within, not doubled) cannot be known.
            self._refuse(lines[:1])
            self._lost, self._broken_at = True, self._number + len(lines) - 2
            self._ahead.extendleft(reversed(lines[1:]))
            self._plain = False
            return
        right = len(row) == len(self.header)
        if self._lost and row and not right:
            self._refuse(lines)
            return
        strange_name = strays and right and any('"' in row[place] for place in self._names)
        self._put(self._waiting, None if strange_name else row, self._number, lines)
        self._number += len(lines)
        self._long |= several
        if row:
            self._run = self._run + 1 if right else max(0, self._run - QUIET_LOSS)
        enough = PROOF if self._lost and self._proven else QUIET_PROOF
        if not self._quoted or self._run >= enough or len(self._waiting[1]) >= LONGEST_FIELD:
            self._settle(good=True)

    def _refuse(self, lines: list[str]) -> None:
        """Lines whose quotes do not match, and with them all that waits."""
        self._settle(good=False)
        self._found[0].extend(range(self._number, self._number + len(lines)))
        self._found[1].extend([QUOTES] * len(lines))
        self._number += len(lines)
        self._proven = False

    def _settle(self, *, good: bool) -> None:
        """What waits is found to be records, or lines whose quotes do not match."""
        numbers, rows = self._waiting
        if good:
            self._found[0].extend(numbers)
            self._found[1].extend(rows)
            self._lost = False
        elif numbers:
            every = range(numbers[0], self._number)
            self._found[0].extend(every)
            self._found[1].extend([QUOTES] * len(every))
        self._waiting, self._long, self._run = ([], []), False, 0


class _Grammar:
    """What a line may look like, where it begins inside a quoted field and where outside (RFC 4180)."""

    def __init__(self, delimiter: str):
        d, text, end = re.escape(delimiter), r'[^"]*+(?:""[^"]*+)*+', r"[\r\n]*+"
        field = rf'(?:"{text}"|[^"{d}\r\n]*+)'
        more = rf"(?:{d}{field})*"
        self.record = re.compile(rf"{field}{more}{end}")
        self.letters = re.compile(rf'(?:[^"{d}\r\n][^{d}\r\n]*+)?(?:{d}(?:[^"{d}\r\n][^{d}\r\n]*+)?)*{end}')
        self.records = re.compile(rf"(?:{field}{more}+(?:\r\n|\n|\r))*+")
        self.outside = re.compile(rf'{field}{more}{end}|(?:{field}{more}{d})?"{text}')
        self.inside = re.compile(rf'{text}(?:"{more}(?:(?P<closed>{end})|{d}"{text}))?')
