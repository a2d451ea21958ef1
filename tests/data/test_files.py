import bz2
import codecs
import dataclasses
import gzip

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from readable_stores import read_texts, texts_by_user, write_jsonl

from fedsim.data.arrow_values import python_values
from fedsim.data.config import DataConfig
from fedsim.data.files import read_files
from fedsim.data.folders import find_files
from fedsim.data.ingest import build_store
from fedsim.data.records import FIELDS, MALFORMED, TWICE
from fedsim.errors import InvalidInput

RECORDS = [{"user_id": user, "text": f'line "{n}",\nÜnïcode'} for n, user in enumerate("abcab")]
WANTED = {"data.user-column": "user_id", "data.text-column": "text"}


def write(path, kind: str, before: bytes = b"") -> None:
    table = pa.Table.from_pylist(RECORDS)
    plain = path.with_name("plain")
    if kind.startswith("parquet"):
        pq.write_table(table, path, row_group_size=2)
        return
    if kind.startswith("jsonl"):
        write_jsonl(plain, RECORDS)
    else:
        delimiter = "\t" if kind.startswith("tsv") else ","
        pyarrow.csv.write_csv(table, plain, pyarrow.csv.WriteOptions(delimiter=delimiter))
    content = before + plain.read_bytes()
    plain.unlink()
    if kind.endswith("gz"):
        content = gzip.compress(content)
    elif kind.endswith("bz2"):
        content = bz2.compress(content)
    elif kind.endswith(("zst", "lz4")):
        codec = {"zst": "zstd", "lz4": "lz4"}[kind[-3:]]
        with pa.CompressedOutputStream(str(path), codec) as stream:
            stream.write(content)
        return
    path.write_bytes(content)


@pytest.mark.parametrize(
    "kind", ["jsonl", "csv", "tsv", "parquet", "jsonl.gz", "csv.gz", "jsonl.zst", "tsv.bz2", "csv.lz4", "jsonl.lz4"]
)
def test_every_format_gives_the_same_users(tmp_path, tokenizer, kind) -> None:
    path = tmp_path / f"data.{kind}"
    write(path, kind)
    config = DataConfig(source="files", path=str(path), validation_fraction=0, test_fraction=0)
    store = build_store(config, tokenizer, tmp_path / "store")
    assert texts_by_user(store) == {
        user: [record["text"] for record in RECORDS if record["user_id"] == user] for user in "abc"
    }
    assert store.manifest["bad_rows"] == {}


def test_folders_and_patterns_of_mixed_shards(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.csv.gz", "sub/c.parquet"):
        write(tmp_path / name, name.split(".", 1)[1])
    (tmp_path / "README.md").write_text("not data")
    names = ["a.csv.gz", "b.jsonl", "c.parquet"]
    assert [file.name for file in find_files(str(tmp_path))] == names
    assert [file.name for file in find_files(str(tmp_path / "**/*.parquet"))] == ["c.parquet"]
    records = list(read_files(find_files(str(tmp_path)), WANTED))
    assert {chunk.origin for chunk in records} == set(names)
    assert sum(map(len, records)) == 15
    done = [chunk.done for chunk in records]
    assert done == sorted(done)
    assert done[-1] == sum(file.stat().st_size for file in find_files(str(tmp_path)))


@pytest.mark.parametrize("name", ["data.txt", "data.parquet.gz", "data", "data.gz"])
def test_other_formats_are_refused(tmp_path, name) -> None:
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(InvalidInput, match="JSON, CSV, TSV or Parquet"):
        find_files(str(tmp_path / name))
    with pytest.raises(InvalidInput, match="JSON, CSV, TSV or Parquet"):
        find_files(str(tmp_path / "*"))


def test_an_empty_folder_is_refused(tmp_path) -> None:
    with pytest.raises(InvalidInput, match=r"data\.path"):
        find_files(str(tmp_path))


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "jsonl.zst", "csv.gz", "tsv.bz2"])
def test_a_file_that_breaks_off_is_refused(tmp_path, kind) -> None:
    path = tmp_path / f"data.{kind}"
    write(path, kind)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(InvalidInput, match="undamaged"):
        list(read_files([path], WANTED))


def test_csv_rows_that_are_short_long_or_not_utf8(tmp_path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"text,user_id\nhello,a\nno user\n\xff\xfe,b\n,c\nand then, I came home,d\n\n")
    (chunk,) = read_files([path], WANTED)
    assert chunk.columns["user_id"] == ["a", FIELDS, "b", "c", FIELDS]
    assert chunk.columns["text"] == ["hello", FIELDS, "\udcff\udcfe", None, FIELDS]
    assert [chunk.position(place) for place in range(len(chunk))] == [f"data.csv:{line}" for line in range(2, 7)]


def test_json_lines_that_are_no_objects(tmp_path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"user_id": 1, "text": "a"}\n\n{"user_id"\n"text"\n')
    (chunk,) = read_files([path], WANTED)
    assert chunk.columns["text"] == ["a", MALFORMED, MALFORMED, MALFORMED]


@pytest.mark.parametrize(
    "line",
    [
        '{"user_id": "a", "user_id": "b", "text": "t"}',
        '{"user_id": "a", "text": "t", "user_id": "a"}',
        '{"user_id": "a", "text": "t", "us\\u0065r_id": "b"}',
        '{"user_id": "a", "text": "t", "text": "u"}',
    ],
)
def test_a_key_that_is_given_twice_has_no_value(tmp_path, line) -> None:
    fine = '{"user_id": "c", "text": "\\"user_id\\" twice", "x": {"user_id": 1, "text": 2}, "y": 1, "y": 2}'
    path = tmp_path / "data.jsonl"
    path.write_text(f"{line}\n{fine}\n{line}\n")
    (chunk,) = read_files([path], WANTED)
    assert chunk.columns == {"user_id": [TWICE, "c", TWICE], "text": [TWICE, '"user_id" twice', TWICE]}
    path.write_text(f"{line}\n")  # alone, it is still no file of another kind
    assert [chunk.columns["user_id"] for chunk in read_files([path], WANTED)] == [[TWICE]]


def test_a_key_with_letters_that_json_escapes_is_found_twice(tmp_path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"a/b": 1, "a\\/b": 2, "text": "t"}\n')
    (chunk,) = read_files([path], {"data.user-column": "a/b", "data.text-column": "text"})
    assert chunk.columns["a/b"] == [TWICE]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "jsonl.gz", "csv.zst"])
def test_a_byte_order_mark_costs_nothing(tmp_path, kind) -> None:
    plain, marked = tmp_path / f"plain.{kind}", tmp_path / f"marked.{kind}"
    write(plain, kind)
    write(marked, kind, before=codecs.BOM_UTF8)
    assert [chunk.columns for chunk in read_files([marked], WANTED)] == [
        chunk.columns for chunk in read_files([plain], WANTED)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_mark_where_one_file_was_appended_to_another_is_no_part_of_an_id(tmp_path, kind) -> None:
    path = tmp_path / f"data.{kind}"
    if kind == "csv":
        path.write_bytes(b"user_id,text\nann,one text\n" + codecs.BOM_UTF8 + b"ann,another\n")
    else:
        line = b'{"user_id": "ann", "text": "one text"}\n'
        path.write_bytes(line + codecs.BOM_UTF8 + line.replace(b"one text", b"another"))
    texts, bad = read_texts(DataConfig(source="files", path=str(path)))
    assert (set(texts), bad) == ({"ann"}, {})


@pytest.mark.parametrize("kind", ["jsonl", "csv", "csv.gz"])
def test_utf_16_is_named(tmp_path, kind) -> None:
    path = tmp_path / f"data.{kind}"
    content = "user_id,text\na,some text\n".encode("utf-16")
    path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    with pytest.raises(InvalidInput, match=r"UTF-16: add --data\.encoding utf-16"):
        list(read_files([path], WANTED))


HIDDEN = [".x.jsonl", "._a.csv", ".ipynb_checkpoints/a.jsonl", "sub/.hidden/b.csv", "_temporary/0/part.jsonl"]


@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_hidden_is_no_data(tmp_path, name) -> None:
    write(tmp_path / "a.jsonl", "jsonl")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ")
    for path in (str(tmp_path), f"{tmp_path}/**/*"):
        assert [file.name for file in find_files(path)] == ["a.jsonl"]
    assert find_files(str(tmp_path / name)) == [tmp_path / name]  # who names it means it
    pattern = tmp_path / name.replace("a.", "*.").replace("b.", "*.").replace("part.", "*.")
    assert find_files(str(pattern)) == [tmp_path / name]


def test_a_hidden_folder_above_the_data_is_none_in_it(tmp_path) -> None:
    (tmp_path / ".work" / "data").mkdir(parents=True)
    write(tmp_path / ".work" / "data" / "a.jsonl", "jsonl")
    for path in (tmp_path / ".work" / "data", tmp_path / ".work" / "data" / "*.jsonl"):
        assert len(find_files(str(path))) == 1


def test_parquet_strings_that_are_not_utf8(tmp_path) -> None:
    values = pa.array([b"good", b"\xff bad", None], pa.binary())
    strings = pa.StringArray.from_buffers(3, values.buffers()[1], values.buffers()[2], values.buffers()[0])
    pq.write_table(pa.table({"user_id": pa.array([1, 2, 3]), "text": strings}), tmp_path / "d.parquet")
    (chunk,) = read_files([tmp_path / "d.parquet"], WANTED)
    assert chunk.columns["text"] == ["good", "\udcff bad", None]
    pq.write_table(pa.table({"user_id": pa.array([1, 2, 3]), "text": values}), tmp_path / "d.parquet")
    (chunk,) = read_files([tmp_path / "d.parquet"], WANTED)
    assert chunk.columns["text"] == ["good", "\udcff bad", None]


def test_users_as_dictionaries_and_numbers(tmp_path, tokenizer) -> None:
    names = pa.array(["ann", "bob", "ann"]).dictionary_encode()
    pq.write_table(pa.table({"user_id": names, "text": ["one text", "two texts", "three"]}), tmp_path / "d.parquet")
    config = DataConfig(source="files", path=str(tmp_path / "d.parquet"), validation_fraction=0, test_fraction=0)
    assert texts_by_user(build_store(config, tokenizer, tmp_path / "store"))["ann"] == ["one text", "three"]


def test_a_column_missing_from_a_later_shard_is_named(tmp_path) -> None:
    write(tmp_path / "a.csv", "csv")
    (tmp_path / "b.csv").write_text("user_id,body\na,b\n")
    with pytest.raises(InvalidInput, match=r"b\.csv: user_id, body"):
        list(read_files(find_files(str(tmp_path)), WANTED))


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path, kind) -> None:
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        columns = [pa.array(["a"]), pa.array(["one text"]), pa.array(["another"])]
        pq.write_table(pa.table(columns, names=["user_id", "text", "text"]), path)
    else:
        path.write_text("user_id,text,text\na,one text,another\n".replace(",", "\t" if kind == "tsv" else ","))
    with pytest.raises(InvalidInput, match=rf"data\.text-column is 'text'.*data\.{kind} has 2 of that name"):
        list(read_files([path], WANTED))
    list(read_files([path], {"data.user-column": "user_id"}))


@pytest.mark.parametrize("strange", ['{\n  "rows": 5\n}\n', '{"rows": 5}\n', "[1, 2]"])
def test_json_of_another_kind_beside_the_data_is_left_out_and_counted(tmp_path, tokenizer, caplog, strange) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a_stats.json").write_text(strange)
    for name in ("b.json", "c.jsonl"):
        write_jsonl(folder / name, RECORDS)
    config = DataConfig(source="files", path=str(folder), validation_fraction=0, test_fraction=0)
    store = build_store(config, tokenizer, tmp_path / "store")
    assert store.num_users == 3
    assert store.manifest["bad_rows"] == {"file without the columns": {"count": 1, "first": ["a_stats.json:1"]}}
    assert caplog.messages == [
        "1 of 11 records left out (not private: counted without noise): "
        "1 × file without the columns (first: a_stats.json:1)"
    ]
    with pytest.raises(InvalidInput, match=r"a_stats\.json:1"):
        build_store(dataclasses.replace(config, bad_rows="refuse"), tokenizer, tmp_path / "refused")
    with pytest.raises(InvalidInput):
        build_store(dataclasses.replace(config, path=str(folder / "a_stats.json")), tokenizer, tmp_path / "alone")
    with pytest.raises(InvalidInput, match=r"data\.user-column is 'author'.*user_id, text"):
        build_store(dataclasses.replace(config, user_column="author"), tokenizer, tmp_path / "wrong")


SINGLES = pa.array([1.5, None, 2.5], pa.float32())
NESTED = {
    "dictionary": (SINGLES.dictionary_encode(), [np.float32, np.float32]),
    "list": (pa.array([[1.5], None, [], [2.5, 3.5]], pa.list_(pa.float32())), [np.float32] * 3),
    "fixed list": (pa.array([[1.5], None], pa.list_(pa.float32(), 1)), [np.float32]),
    "list of lists": (pa.array([[[1.5], []], None], pa.large_list(pa.list_(pa.float16()))), [np.float16]),
    "list of records": (pa.array([[{"a": 1.5}, None]], pa.list_(pa.struct({"a": pa.float32()}))), [np.float32]),
    "list of bytes": (pa.array([[b"\xff"], None, [b"a", None]], pa.list_(pa.binary())), [str, str]),
}


def leaves(value) -> list:
    if isinstance(value, list | dict):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in leaves(item)]
    return [] if value is None or value != value else [value]


@pytest.mark.parametrize("shape", NESTED)
def test_numbers_keep_their_precision_and_bytes_become_text_at_any_depth(shape) -> None:
    array, kinds = NESTED[shape]
    for part in (array, array.slice(1)):
        values = python_values(part)
        assert len(values) == len(part)
        if part is array:
            assert list(map(type, leaves(values))) == kinds
        if shape != "list of bytes":
            assert [leaf for leaf in leaves(values)] == leaves(part.to_pylist())
            if shape != "dictionary":
                assert [value is None for value in values] == [value is None for value in part.to_pylist()]
