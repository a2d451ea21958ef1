"""Text files in another encoding, or with other characters between fields, than their names say."""

import csv
import gzip
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readable_stores import read_texts

from fedsim.data.config import DataConfig
from fedsim.errors import InvalidInput

ROWS = [("zoë", "Größe; 5|6\t7"), ("andré", 'says "ça va",\nand goes'), ("bob", "plain")]


def read(path, **options):
    found, bad = read_texts(DataConfig(source="files", path=str(path), **options))
    return {user: list(own) for user, own in found.items()}, bad


def csv_text(delimiter: str) -> str:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([("user_id", "text"), *ROWS])
    return file.getvalue()


@pytest.mark.parametrize(
    ("given", "delimiter"), [(";", ";"), ("|", "|"), ("\\t", "\t"), ("tab", "\t"), ("¦", "¦"), ("^", "^")]
)
@pytest.mark.parametrize("name", ["data.csv", "data.tsv"])
def test_a_delimiter_that_is_named(tmp_path, name, given, delimiter) -> None:
    (tmp_path / name).write_text(csv_text(delimiter), encoding="utf-8", newline="")
    expected = {user: [text] for user, text in ROWS}
    assert read(tmp_path / name, delimiter=given) == (expected, {})


@pytest.mark.parametrize("delimiter", [";", "|"])
def test_another_delimiter_is_pointed_out(tmp_path, delimiter) -> None:
    (tmp_path / "d.csv").write_text(csv_text(delimiter), encoding="utf-8")
    with pytest.raises(InvalidInput, match=rf"between '\{delimiter}': name that with --data\.delimiter"):
        read(tmp_path / "d.csv")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "UTF-16-LE", "utf_32", "utf8", "utf-8-sig"])
@pytest.mark.parametrize("name", ["d.csv", "d.jsonl", "d.json", "d.csv.gz", "leaf.json"])
def test_an_encoding_that_is_named(tmp_path, encoding, name) -> None:
    records = [{"user_id": user, "text": text} for user, text in ROWS]
    if name.startswith("d.csv"):
        content = csv_text(",")
    elif name == "d.jsonl":
        content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    elif name == "d.json":
        content = json.dumps(records, ensure_ascii=False)
    else:
        content = json.dumps({"user_data": {user: {"x": [text]} for user, text in ROWS}}, ensure_ascii=False)
    data = content.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read(tmp_path / name, encoding=encoding) == ({user: [text] for user, text in ROWS}, {})


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.text("ué😀b", min_size=1), st.text("x,é😀\"'", min_size=1)), min_size=1, max_size=30),
    st.sampled_from(["utf-16", "utf-32-be", "gb18030", "utf-8-sig"]),
    st.sampled_from([1, 2, 3, 7, 1 << 16]),
)
def test_letters_are_not_cut_where_blocks_end(tmp_path_factory, rows, encoding, block) -> None:
    path = tmp_path_factory.mktemp("d") / "d.jsonl"
    path.write_bytes(
        "".join(json.dumps({"user_id": u, "text": t}, ensure_ascii=False) + "\n" for u, t in rows).encode(encoding)
    )
    expected: dict[str, set[str]] = {}
    for user, text in rows:
        expected.setdefault(user, set()).add(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsim.data.text_streams.BLOCK", block)
        found, bad = read(path, encoding=encoding)
    assert ({user: set(own) for user, own in found.items()}, bad) == (expected, {})


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "shift_jis"])
def test_what_is_nothing_in_the_encoding_is_a_bad_row_that_names_the_option(tmp_path, encoding) -> None:
    (tmp_path / "d.jsonl").write_bytes(
        b'{"user_id": "a", "text": "caf\xa9\xff\xfe"}\n{"user_id": "a", "text": "good text"}\n'
        b'{"user_id": "\xff\xfe", "text": "whose?"}\n'
    )
    found, bad = read(tmp_path / "d.jsonl", encoding=encoding)
    assert found == {"a": ["good text"]}
    assert sum(bad.values()) == 2
    assert any("data.encoding" in reason for reason in bad)


def test_bytes_that_are_nothing_never_join_to_letters(tmp_path) -> None:
    """Each by itself is nothing in ASCII; together they would be é in UTF-8."""
    (tmp_path / "d.csv").write_bytes(b"user_id,text\na,caf\xc3\xa9\n")
    found, bad = read(tmp_path / "d.csv", encoding="ascii")
    assert found == {}
    assert sum(bad.values()) == 1


def test_a_header_in_another_encoding_names_the_option(tmp_path) -> None:
    (tmp_path / "d.csv").write_bytes("größe,text\n5,abc\n".encode("latin-1"))
    with pytest.raises(InvalidInput, match=r"d\.csv.*--data\.encoding"):
        read(tmp_path / "d.csv", user_column="größe")
    assert read(tmp_path / "d.csv", user_column="größe", encoding="latin-1") == ({"5": ["abc"]}, {})


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"delimiter": ";;"}, "data.delimiter"),
        ({"delimiter": '"'}, "data.delimiter"),
        ({"delimiter": "\n"}, "data.delimiter"),
        ({"delimiter": ""}, "data.delimiter"),
        ({"encoding": "klingon"}, "data.encoding"),
        ({"encoding": "hex"}, "data.encoding"),
        ({"encoding": ""}, "data.encoding"),
        ({"source": "hub", "encoding": "latin-1"}, "data.encoding"),
        ({"source": "hub", "delimiter": ";"}, "data.delimiter"),
        ({"source": "store", "delimiter": ";"}, "data.delimiter"),
    ],
)
def test_what_makes_no_sense_is_refused(options, field) -> None:
    with pytest.raises(InvalidInput) as error:
        DataConfig(**({"source": "files", "path": "x"} | options))
    assert error.value.field == field


@pytest.mark.parametrize(
    ("name", "options"),
    [("d.parquet", {"encoding": "latin-1"}), ("d.parquet", {"delimiter": ";"}), ("d.jsonl", {"delimiter": ";"})],
)
def test_options_that_would_do_nothing_are_refused(tmp_path, name, options) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InvalidInput, match=r"left out where"):
        read(tmp_path / name, **options)
