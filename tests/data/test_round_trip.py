"""Whose text is whose, in every format, compression and dialect: what its own library writes is read back, whole."""

import bz2
import codecs
import csv
import gzip
import io
import json
from collections import Counter
from pathlib import Path

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readable_stores import read_texts

from fedsim.data.config import DataConfig

LETTERS = st.sampled_from("ab ,;\t\"'\n|é😀[]{}\\:\ufeff\x00")
USERS = st.text(LETTERS, min_size=1, max_size=4).filter(
    lambda user: user.strip("\ufeff").strip() and not user.endswith("\r")
)
TEXTS = st.text(LETTERS, max_size=12).map(lambda text: f"{text}.") | st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8
).filter(lambda text: bool(text.strip()) and not text.endswith("\r"))
TABLES = st.lists(st.tuples(USERS, TEXTS), min_size=1, max_size=12)
ENDS = ["", ".gz", ".bz2", ".zst", ".lz4"]


def packed(content: bytes, path: Path) -> Path:
    kind = path.suffix
    if kind in (".zst", ".lz4"):
        with pa.CompressedOutputStream(str(path), {".zst": "zstd", ".lz4": "lz4"}[kind]) as stream:
            stream.write(content)
    else:
        path.write_bytes({".gz": gzip.compress, ".bz2": bz2.compress}.get(kind, bytes)(content))
    return path


def expected(table: list[tuple[str, str]]) -> dict[str, Counter]:
    texts: dict[str, Counter] = {}
    for user, text in table:
        texts.setdefault(user.strip("\ufeff"), Counter())[text] += 1
    return texts


def require_the_same(path: Path, table: list[tuple[str, str]], source: str = "files") -> None:
    texts, bad = read_texts(DataConfig(source=source, path=str(path)))
    assert bad == {}
    assert texts == expected(table)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_the_csv_modules_tables(kind, end, tmp_path) -> None:
    @settings(max_examples=40)
    @given(
        TABLES,
        st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
        st.sampled_from(["\n", "\r\n"]),
        st.booleans(),
        st.permutations(["user_id", "text", "beside"]),
    )
    def check(table, quoting, line_end, mark, order) -> None:
        stream = io.StringIO(newline="")
        delimiter = "\t" if kind == "tsv" else ","
        writer = csv.DictWriter(stream, order, delimiter=delimiter, quoting=quoting, lineterminator=line_end)
        writer.writeheader()
        writer.writerows({"user_id": user, "text": text, "beside": text[::-1]} for user, text in table)
        content = codecs.BOM_UTF8 * mark + stream.getvalue().encode()
        require_the_same(packed(content, tmp_path / f"data.{kind}{end}"), table)

    check()


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_pandas_tables_of_text(kind, tmp_path) -> None:
    @settings(max_examples=40)
    @given(TABLES)
    def check(table) -> None:
        path = tmp_path / f"data.{kind}.gz"
        frame = pandas.DataFrame(table, columns=["user_id", "text"])
        frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
        require_the_same(path, table)

    check()


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_tables_without_quotes(kind, tmp_path) -> None:
    delimiter = "\t" if kind == "tsv" else ","

    @settings(max_examples=40)
    @given(TABLES)
    def check(table) -> None:
        table = [
            tuple(value.replace(delimiter, " ").replace("\n", " ").rstrip("\r") for value in row) for row in table
        ]
        table = [row for row in table if row[0].strip("\ufeff ").strip() and row[1].strip()] or [("a", "b")]
        lines = [delimiter.join(row) for row in [("user_id", "text"), *table]]
        path = packed("\n".join(lines).encode(), tmp_path / f"data.{kind}")
        texts, bad = read_texts(DataConfig(source="files", path=str(path), quotes="none"))
        assert (texts, bad) == (expected(table), {})

    check()


@pytest.mark.parametrize("end", ENDS)
def test_json_lines(end, tmp_path) -> None:
    @settings(max_examples=40)
    @given(TABLES, st.booleans(), st.booleans(), st.sampled_from(["\n", "\r\n"]))
    def check(table, escaped, mark, line_end) -> None:
        lines = (
            json.dumps({"text": text, "beside": {"user_id": text}, "user_id": user}, ensure_ascii=escaped)
            for user, text in table
        )
        content = codecs.BOM_UTF8 * mark + line_end.join(lines).encode()
        require_the_same(packed(content, tmp_path / f"data.jsonl{end}"), table)

    check()


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_parquet(compression, tmp_path) -> None:
    @settings(max_examples=40)
    @given(TABLES, st.sampled_from([pa.string(), pa.large_string(), pa.string_view(), pa.binary()]), st.booleans())
    def check(table, type_, dictionary) -> None:
        users = pa.array([user for user, _ in table], pa.string())
        users = users.dictionary_encode() if dictionary else users.cast(type_)
        texts = pa.array([text for _, text in table], pa.string()).cast(type_)
        path = tmp_path / "data.parquet"
        pq.write_table(pa.table({"user_id": users, "text": texts}), path, compression=compression, row_group_size=5)
        require_the_same(path, table)

    check()


@pytest.mark.parametrize("layout", ["saved", "parquet"])
def test_data_sets_of_the_hub(layout, tmp_path_factory) -> None:
    @settings(max_examples=6)
    @given(TABLES)
    def check(table) -> None:
        folder = tmp_path_factory.mktemp("hub") / "data"
        data = datasets.Dataset.from_dict({"user_id": [u for u, _ in table], "text": [t for _, t in table]})
        if layout == "saved":
            data.save_to_disk(folder)
        else:
            folder.mkdir()
            data.to_parquet(folder / "train.parquet")
        require_the_same(folder, table, source="hub")

    check()


def test_lines_that_end_as_they_did_on_the_first_macintosh(tmp_path) -> None:
    (tmp_path / "data.csv").write_bytes(b'user_id,text\rann,one\rbob,"two\rlines"\r')
    require_the_same(tmp_path / "data.csv", [("ann", "one"), ("bob", "two\rlines")])


def test_a_carriage_return_ends_no_line_where_lines_end_otherwise(tmp_path) -> None:
    (tmp_path / "data.csv").write_bytes(b"user_id,text\nann,10 %\rbob, 20 %\ncid,words\n")
    texts, bad = read_texts(DataConfig(source="files", path=str(tmp_path / "data.csv")))
    assert (set(texts), list(bad)) == ({"cid"}, ["more or fewer fields than the header"])
