"""CSV and TSV: what is well-formed is read as it was written, and what is not gives nobody another's text."""

import csv
import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data import delimited
from fedsim.data.delimited import DelimitedReader, Joined
from fedsim.data.records import FIELDS, QUOTES

HEADERS = (["user", "text"], ["text", "user"], ["user", "note", "text"], ["note", "text", "user"])
DIALECTS = st.fixed_dictionaries(
    {
        "delimiter": st.sampled_from(",\t"),
        "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
        "lineterminator": st.sampled_from(["\n", "\r\n"]),
    }
)


def written(header: list[str], rows: list[list[str]], dialect: dict) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, **dialect)
    writer.writerow(header)
    writer.writerows(rows)
    return stream.getvalue()


def read(content: str, delimiter: str = ",", **options) -> tuple[list, list]:
    reader = DelimitedReader(iter(io.StringIO(content, newline="\n")), delimiter, **options)
    numbers, rows = [], []
    for some_numbers, some in reader.rows():
        assert len(some_numbers) == len(some)
        numbers.extend(some_numbers)
        rows.extend(some)
    return numbers, rows


@pytest.fixture(params=[(1, 1), (3, 2), (4096, 8)], autouse=True)
def sizes(request, monkeypatch) -> None:
    """Few lines at once, so that records lie across what is read in one go."""
    for name, value in zip(("LINES_AT_ONCE", "PROOF"), request.param, strict=True):
        monkeypatch.setattr(delimited, name, value)


fields = (st.text(st.sampled_from('ab ,\t"\n;é\x00\r'), max_size=9) | st.text(max_size=5)).filter(
    lambda t: t[-1:] != "\r"
)


@settings(max_examples=150)
@given(st.lists(st.tuples(fields, fields, fields).map(list), max_size=30), DIALECTS)
def test_what_the_csv_module_writes_is_read_as_it_was_written(rows, dialect) -> None:
    content = written(["user", "note", "text"], rows, dialect)
    numbers, found = read(content, dialect["delimiter"])
    assert found == rows
    assert numbers == sorted(set(numbers))


class Marked:
    """Rows of users 0, 1, …, in whose fields every word tells the user."""

    def __init__(self, shapes: list[tuple[int, list[str]]], header: list[str]):
        self.rows = []
        for number, (repeats, pieces) in enumerate(shapes):
            mark = chr(ord("A") + number)
            text = "".join(piece.replace("w", f"w{mark}") for piece in pieces) * repeats or f"w{mark}"
            values = {"user": f"u{mark}", "text": text, "note": f"n{mark}"}
            self.rows.append([values[column] for column in header])

    @staticmethod
    def mixed(row: list[str], header: list[str]) -> bool:
        """Whether a row holds words of another than its user."""
        user = row[header.index("user")]
        words = set(re.findall(r"[uwn]([A-Z])", " ".join(row)))
        return bool(words - {user[1:]})


pieces = st.lists(
    st.sampled_from(["w", " w ", ",", ", w", '"', '"w"', "\n", "\nw", "w\n", "\nw, w\n", '\n"w", w']), max_size=6
)


@settings(max_examples=500)
@given(
    st.lists(st.tuples(st.integers(0, 2), pieces), min_size=1, max_size=24),
    st.sampled_from(HEADERS),
    DIALECTS,
    st.floats(0, 1, exclude_max=True),
    st.booleans(),
)
def test_one_quote_too_few_or_too_many_gives_nobody_anothers_text(shapes, header, dialect, where, more) -> None:
    content = written(header, Marked(shapes, header).rows, dialect)
    begin = content.index(dialect["lineterminator"]) + 1
    if more:
        place = begin + int(where * (len(content) - begin))
        content = content[:place] + '"' + content[place:]
    else:
        quotes = [place for place in range(begin, len(content)) if content[place] == '"']
        if not quotes:
            return
        place = quotes[int(where * len(quotes))]
        content = content[:place] + content[place + 1 :]
    _, found = read(content, dialect["delimiter"], names=["user"])
    mixed = [row for row in found if isinstance(row, list) and Marked.mixed(row, header)]
    assert not mixed, (content, mixed)


HEADER = "user_id,text\n"
UNCLOSED = (
    'ann,hello there my dear friend\nbob,"she said and never closed it\ncid,cid wrote this\ndan,dan wrote that\n'
)


def told(content: str, **options) -> list[str]:
    """Each row in one word: its user, or what is wrong with it."""
    _, rows = read(HEADER + content, names=["user_id"], **options)
    return [row[0] if isinstance(row, list) else {FIELDS: "fields", QUOTES: "quotes"}[row] for row in rows]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (UNCLOSED, "ann quotes quotes quotes"),
        ('ann,a\nbob,"she said\ncid,c\ndan,"x"\neve,"hi, all"\n', "ann quotes quotes quotes eve"),
        ('ann,a\nbob,hello"\ncid,c\neve,"hi, all"\n', "quotes quotes cid eve"),
        ('bob,"she said\ncid,cid wrote\ndan,"\nhello"\neve,e\nfay,"hi, all"\n', "quotes " * 4 + "eve fay"),
        ('bob,"he said "hi" to me"\ncid,c\neve,"hi, all"\n', "quotes cid eve"),
        ('bob,5" pipe\ncid,12" record\n', "bob cid"),
        ('b"ob,text\ncid,c\n', "fields cid"),
        ("ann,a, b\nbob\n\ncid,c\n", "fields fields cid"),
        ('ann,"x, y\nbob,z"\ncid,5" w\ndan,"ok"\n', "quotes quotes quotes dan"),
        ('ann,"two\nlines"\nbob,"three\n""quoted""\nlines, all well"\n', "ann bob"),
    ],
)
def test_what_a_stray_quote_costs(content, expected, monkeypatch) -> None:
    monkeypatch.setattr(delimited, "PROOF", 1)
    assert told(content) == expected.split()


def test_letters_that_look_like_quotes_are_letters_on_request() -> None:
    assert told(UNCLOSED, quoted=False) == ["ann", "bob", "cid", "dan"]
    _, rows = read('user_id\ttext\nann\t"one\nbob\tsaid "two"\n', "\t", quoted=False)
    assert rows == [["ann", '"one'], ["bob", 'said "two"']]


def plain_lines(count: int) -> str:
    return "".join(f"u{number},some text of user {number}\n" for number in range(count))


def test_a_bad_quote_in_a_large_file_costs_the_rows_around_it() -> None:
    assert told('bob,"never closed\n' + plain_lines(5000)).count("quotes") == 1
    quoted = plain_lines(5000).replace(",", ',"').replace("r 4000\n", "r 4000\n").replace("\n", '"\n')
    broken = quoted.replace('of user 3000"', "of user 3000")
    assert told(broken).count("quotes") == 2
    assert told(quoted) == [f"u{number}" for number in range(5000)]


def test_lines_read_again_are_judged_anew(monkeypatch) -> None:
    monkeypatch.setattr(delimited, "QUIET_PROOF", 4)
    users = ["u0", "u1", "u2", "u3"]
    assert told(f'bob,"never closed\n{plain_lines(6)}cid,""x""\n') == ["quotes", *users, "quotes", "quotes", "quotes"]


def test_a_field_without_end_takes_no_more_memory_than_the_longest(monkeypatch) -> None:
    monkeypatch.setattr(delimited, "LONGEST_FIELD", 50)
    reader = DelimitedReader(iter([HEADER, 'bob,"x\n', *["no record\n"] * 5000]), ",")
    assert sum(len(rows) for _, rows in reader.rows()) == 5001
    text = "\n".join(["line"] * 49)
    assert told(f'ann,"{text}"\n') == ["ann"]


def test_lines_that_now_and_then_fit_the_header_are_not_settled_by_their_number() -> None:
    """A text whose opening quote is missing, of more lines than are read at once."""
    text = "she said, hello\nand went on\n" * 2500
    found = told(f'ann,a\nbob,this begins\n{text}and ends"\n{plain_lines(9)}')
    assert set(found) <= {"quotes", *(f"u{number}" for number in range(9))}


JOINED_ROWS = [
    ("user_id,text,date", 'a,"hello,2020\nb,pipe of 5",2021\nc,fine,2022\n'),
    ("user_id,text", 'a,"hello\nb,""\nc,secret\nd,bye"\n'),
    ("user_id,text", 'a,"hello\r\n\r\nb,size 5"\r\n'),
    ("text,user_id", '"hello,a\nsecret of b,b\n5",c\n'),
]
APART = [
    ("user_id,text", 'a,"hello\nand bye"\nb,x\n'),
    ("user_id,text", 'a,"hello, you\nb, c"\n'),
    ("user_id,text,date", 'a,"hello\nb,5",2021\n'),
    ("user_id,text", 'a,"he said ""hi, b"""\nb,x\n'),
]


@pytest.mark.parametrize(("header", "content"), JOINED_ROWS + APART)
def test_a_record_whose_every_line_could_be_one_says_so(header, content) -> None:
    for before, after in (("", ""), ('x,"good, one"\n' if header == "user_id,text" else "", 300)):
        lines = "".join(",".join(f"{name[0]}{n}" for name in header.split(",")) + "\n" for n in range(after or 0))
        _, rows = read(f"{header}\n{before}{content}{lines}")
        found = [row for row in rows if isinstance(row, Joined)]
        assert len(found) == ((header, content) in JOINED_ROWS)
        assert all(any("\n" in value for value in row) for row in found)
    _, rows = read(f"{header}\n{content}", quoted=False)
    assert not any(isinstance(row, Joined) for row in rows)


@settings(max_examples=100)
@given(st.lists(st.tuples(fields, fields).map(list) | st.none(), max_size=30), DIALECTS)
def test_lines_with_nothing_on_them_are_passed_over(rows, dialect) -> None:
    end = dialect["lineterminator"]
    content = "".join(
        end if row is None else written(row, [], dialect) for row in (None, ["user", "text"], *rows, None)
    )
    _, found = read(content, dialect["delimiter"])
    assert found == [row for row in rows if row is not None]


def test_with_one_column_an_empty_line_is_an_empty_record() -> None:
    assert read("user\na\n\nb\n") == ([2, 3, 4], [["a"], [""], ["b"]])
