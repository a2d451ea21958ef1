"""Columns by a path to what is inside others, in every format."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from readable_stores import read_texts, write_jsonl

from fedsim.data.check import OWNERS_UNREAD
from fedsim.data.column_paths import ABSENT, value_of
from fedsim.data.config import DataConfig
from fedsim.data.files import read_files
from fedsim.data.records import TWICE
from fedsim.errors import InvalidInput

ROWS = [
    {
        "author": {"id": user, "name": {"first": f"F{user}"}},
        "post": {"body": f"text {n}"},
        "owners": [{"id": user}],
        "id": n,
    }
    for n, user in enumerate("abcab")
]
KINDS = ["jsonl", "json", "parquet", "hub parquet", "hub jsonl", "hub saved", "saved"]


def written(folder, kind: str, rows: list[dict]) -> DataConfig:
    """A configuration that reads these rows from a file or folder of this kind, but for its columns."""
    folder.mkdir()
    if kind.endswith("saved"):
        datasets.Dataset.from_list(rows).save_to_disk(folder)
    elif kind.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet", row_group_size=2)
    elif kind == "json":
        (folder / "train.json").write_text(json.dumps(rows))
    else:
        write_jsonl(folder / "train.jsonl", rows)
    return DataConfig(source="hub" if kind.startswith("hub") else "files", path=str(folder))


def with_columns(config: DataConfig, **columns) -> DataConfig:
    return DataConfig(source=config.source, path=config.path, **columns)


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_names_what_is_inside_a_column(tmp_path, kind) -> None:
    config = written(tmp_path / "data", kind, ROWS)
    expected = {user: {r["post"]["body"]: 1 for r in ROWS if r["author"]["id"] == user} for user in "abc"}
    for owners in (None, "owners.id"):
        columns = {"user_column": "author.id", "text_column": "post.body", "owners_column": owners}
        assert read_texts(with_columns(config, **columns)) == (expected, {})
    texts, bad = read_texts(with_columns(config, user_column="author.name.first", text_column="post.body"))
    assert (set(texts), bad) == ({"Fa", "Fb", "Fc"}, {})
    texts, bad = read_texts(with_columns(config, user_column="owners.0.id", text_column="post.body"))
    assert (set(texts), bad) == (set("abc"), {})


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_to_nothing_is_answered_with_those_there_are(tmp_path, kind) -> None:
    config = written(tmp_path / "data", kind, ROWS)
    with pytest.raises(InvalidInput) as error:
        read_texts(with_columns(config, user_column="author.login", text_column="post.body"))
    assert error.value.field == "data.user-column"
    for name in ("author", "post", "author.id", "author.name", "author.name.first", "post.body", "owners.id"):
        assert name in error.value.allowed.partition(": ")[2].split(", ")


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_whose_very_name_has_a_point_comes_first(tmp_path, kind) -> None:
    rows = [{"author": {"id": "inner"}, "author.id": "outer", "a.b": {"c": "deep"}, "text": "a text"}]
    config = written(tmp_path / "data", kind, rows)
    assert set(read_texts(with_columns(config, user_column="author.id"))[0]) == {"outer"}
    assert set(read_texts(with_columns(config, user_column="a.b.c"))[0]) == {"deep"}


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_stands_on_the_way_the_user_is_missing(tmp_path, kind) -> None:
    rows = [*ROWS, {**ROWS[0], "author": None}, {**ROWS[0], "author": {"id": None, "name": None}}]
    config = written(tmp_path / "data", kind, rows)
    _, bad = read_texts(with_columns(config, user_column="author.id", text_column="post.body"))
    assert bad == {"missing user": 2}


def test_csv_has_names_with_points_and_no_paths(tmp_path) -> None:
    (tmp_path / "d.csv").write_text('author.id,author,text\nann,"{""id"": ""bob""}",a text\n')
    config = DataConfig(source="files", path=str(tmp_path / "d.csv"), user_column="author.id")
    assert set(read_texts(config)[0]) == {"ann"}
    with pytest.raises(InvalidInput, match=r"d\.csv: author\.id, author, text"):
        read_texts(with_columns(config, user_column="author.name"))


@pytest.mark.parametrize(
    "line",
    [
        '{"author": {"id": "a", "id": "b"}, "text": "x"}',
        '{"author": {"id": "a"}, "author": {"id": "b"}, "text": "x"}',
        '{"author": {"id": "a", "\\u0069d": "b"}, "text": "x"}',
        '{"author.id": "a", "author.id": "b", "text": "x"}',
    ],
)
def test_a_key_on_the_way_that_is_given_twice_leads_to_no_value(tmp_path, line) -> None:
    (tmp_path / "d.jsonl").write_text('{"author": {"id": "c"}, "text": "x"}\n' + line + "\n")
    (chunk,) = read_files([tmp_path / "d.jsonl"], {"data.user-column": "author.id", "data.text-column": "text"})
    assert chunk.columns["author.id"] == ["c", TWICE]


def test_two_keys_of_one_name_on_the_way_are_refused(tmp_path) -> None:
    struct = pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["id", "id"])
    pq.write_table(pa.table({"author": struct, "text": ["x"]}), tmp_path / "d.parquet")
    with pytest.raises(InvalidInput, match=r"data\.user-column is 'author\.id'.*2 are called 'id'.*Rename"):
        list(read_files([tmp_path / "d.parquet"], {"data.user-column": "author.id", "data.text-column": "text"}))


def test_numbers_inside_keep_their_precision(tmp_path) -> None:
    """As in a column of its own: two people may have had the number that is left in single precision."""
    kind = pa.struct({"id": pa.float32(), "all": pa.list_(pa.struct({"id": pa.float32()}))})
    rows = pa.array([{"id": 16777217.0, "all": [{"id": 16777217.0}]}], kind)
    (tmp_path / "data").mkdir()
    table = pa.table({"author": rows, "text": ["some text"], "number": ["16777216"]})
    pq.write_table(table, tmp_path / "data" / "train.parquet")
    for source in ("files", "hub"):
        for column in ("author.id", "author.all.0.id"):
            _, bad = read_texts(DataConfig(source=source, path=str(tmp_path / "data"), user_column=column))
            assert [reason for reason in bad if "digits are lost" in reason]
        columns = {"user_column": "number", "owners_column": "author.all.id"}
        _, bad = read_texts(DataConfig(source=source, path=str(tmp_path / "data"), **columns))
        assert [reason for reason in bad if "digits are lost" in reason]


def test_only_what_is_asked_for_is_read_of_a_column(tmp_path, monkeypatch) -> None:
    table = pa.table({"author": [{"id": "a", "biography": "b" * 1000}], "text": ["a text"]})
    pq.write_table(table, tmp_path / "d.parquet")
    asked = []
    read = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda *a, **o: asked.append(o.get("columns")) or read(*a, **o)
    )
    list(read_files([tmp_path / "d.parquet"], {"data.user-column": "author.id", "data.text-column": "text"}))
    assert asked == [["author.id", "text"]]


def test_lists_and_paths() -> None:
    record = {"a": [{"b": 1}, {"c": 2}], "n": [[1, 2]], "e": [], "x": np.float32(1)}
    assert value_of(record, "a.b") == [1, None]
    assert value_of(record, "a.z") is ABSENT
    assert value_of(record, "a.1.c") == 2
    assert value_of(record, "a.7.c") is ABSENT
    assert value_of(record, "n.0.1") == 2
    assert value_of(record, "e.b") == []
    assert value_of(record, "x.b") is ABSENT
    assert value_of({".": {"": 1}}, ".") == {"": 1}
    assert value_of({"a": 1}, ".a") is ABSENT


@pytest.mark.parametrize("kind", ["jsonl", "json", "hub jsonl"])
@pytest.mark.parametrize(
    "joint",
    [["ann", "bob"], "ann;bob", [{"name": "ann"}, {"name": "bob"}], [{"id": "ann"}, "bob"], {"name": "ann"}, {}, 7],
)
def test_owners_that_a_path_does_not_find_are_not_nobody(tmp_path, kind, joint) -> None:
    """What several people may own is never one user's alone for want of a key."""
    row = {"user_id": "ann", "text": "hers", "authors": [{"id": "ann"}]}
    rows = [row, row | {"authors": joint, "text": "whose?"}, {"user_id": "ann", "text": "no authors"}]
    rows += [row | {"authors": None, "text": "null"}]
    config = written(tmp_path / "data", kind, rows)
    config = with_columns(config, owners_column="authors.id")
    texts, bad = read_texts(config)
    assert set(texts["ann"]) == {"hers", "no authors", "null"}
    assert sum(bad.values()) == 1


def test_a_place_that_a_list_of_owners_has_not_is_not_nobody(tmp_path) -> None:
    rows = [{"user_id": "ann", "text": f"{n}", "authors": [{"id": "ann"}] * n} for n in (2, 1, 0)]
    for kind in ("parquet", "hub parquet", "saved"):
        config = written(tmp_path / kind, kind, rows)
        texts, bad = read_texts(with_columns(config, owners_column="authors.1.id"))
        assert (set(texts["ann"]), bad) == ({"2"}, {OWNERS_UNREAD: 2})
