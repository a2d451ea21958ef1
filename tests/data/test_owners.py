"""Rows of several owners: declared, they are read or left out; undeclared, they are pointed out."""

import csv
import json
import logging
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readable_stores import read_texts, texts_by_user, write_jsonl

from fedsim.data.config import DataConfig
from fedsim.data.doubts import doubtful_owners, in_words, owner_columns, undeclared_owners
from fedsim.data.ingest import build_store
from fedsim.errors import InvalidInput

GOOD = [None, [], "[]", "", " ", ["u0"], ["u0", "u0"], '["u0"]', ' [ "u0" ] ', "u0"]
BAD = {
    "several owners": [["u0", "u1"], '["u0", "u1"]', ["u1", "u2"]],
    "owners without the user": [["u1"], '["u1"]', [7], 7],
    "missing owner": [["u0", None], [None], ["u0", ""], '["u0", null]', ["u0", "nan"], "NULL"],
    "owners that cannot be read": [
        "u0;u1",
        "u0,u1",
        "u1",
        "['u0']",
        '["u0"',
        [["u0"]],
        [{"id": "u0"}],
        {"id": "u0"},
        ["u0", True],
        True,
    ],
}


def record(owners) -> dict:
    return {"user_id": "u0", "text": "some text", "owners": owners}


def outcome(path, records, **options) -> dict[str, int]:
    write_jsonl(path, records)
    config = DataConfig(source="files", path=str(path), owners_column="owners", **options)
    texts, bad = read_texts(config)
    return {reason.partition(" (")[0]: count for reason, count in bad.items()} | {
        "good": sum(map(len, texts.values()))
    }


@pytest.mark.parametrize("owners", GOOD, ids=repr)
def test_one_owner_is_the_user(tmp_path, owners) -> None:
    assert outcome(tmp_path / "d.jsonl", [record(owners)]) == {"good": 1}


@pytest.mark.parametrize(
    ("reason", "owners"), [(reason, owners) for reason, all in BAD.items() for owners in all], ids=repr
)
def test_anything_else_is_a_bad_row(tmp_path, reason, owners) -> None:
    assert outcome(tmp_path / "d.jsonl", [record(owners)]) == {reason: 1, "good": 0}


def test_what_cannot_be_read_says_what_can(tmp_path, tokenizer) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [record("u0;u1")])
    config = DataConfig(source="files", path=str(path), owners_column="owners", bad_rows="refuse")
    with pytest.raises(InvalidInput, match=r"d\.jsonl:1.*list of ids.*JSON list.*data\.owners-separator"):
        build_store(config, tokenizer, tmp_path / "store")


@pytest.mark.parametrize(
    ("owners", "expected"),
    [
        ("u0", {"good": 1}),
        ("u0; u0;", {"good": 1}),
        ("u0;u1", {"several owners": 1, "good": 0}),
        ("u1", {"owners without the user": 1, "good": 0}),
        ("", {"good": 1}),
        (" ; ", {"good": 1}),
        ("[]", {"owners without the user": 1, "good": 0}),
        (["u0"], {"good": 1}),
    ],
)
def test_owners_around_a_declared_separator(tmp_path, owners, expected) -> None:
    assert outcome(tmp_path / "d.jsonl", [record(owners)], owners_separator=";") == expected


def test_a_separator_without_owners_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"data\.owners-separator.*--data\.owners-column"):
        DataConfig(source="files", path="x", owners_separator=";")
    with pytest.raises(InvalidInput, match=r"data\.owners-separator"):
        DataConfig(source="files", path="x", owners_column="o", owners_separator="")


people = st.sampled_from(["ann", "bob", "7", "bob, Jr", 'c"d'])


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "hub"])
def test_every_format_leaves_the_same_rows(kind, tmp_path_factory) -> None:
    @settings(max_examples=5 if kind == "hub" else 25)
    @given(st.lists(st.tuples(people, st.lists(people, min_size=1, max_size=3)), min_size=1, max_size=8))
    def check(rows) -> None:
        path = tmp_path_factory.mktemp("data") / f"train.{'parquet' if kind == 'hub' else kind}"
        records = [{"user_id": u, "text": f"text {n}", "who": owners} for n, (u, owners) in enumerate(rows)]
        if kind in ("parquet", "hub"):
            schema = pa.schema({"user_id": pa.string(), "text": pa.string(), "who": pa.list_(pa.string())})
            pq.write_table(pa.Table.from_pylist(records, schema), path)
        elif kind == "jsonl":
            write_jsonl(path, records)
        else:
            with path.open("w", newline="") as file:
                writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
                writer.writerow(records[0])
                writer.writerows([*list(r.values())[:2], json.dumps(r["who"])] for r in records)
        source, place = ("hub", path.parent) if kind == "hub" else ("files", path)
        texts, bad = read_texts(DataConfig(source=source, path=str(place), owners_column="who"))
        alone = {f"text {n}": user for n, (user, owners) in enumerate(rows) if set(owners) == {user}}
        assert {text: user for user, own in texts.items() for text in own} == alone
        assert bad.get("several owners", 0) == sum(len(set(owners)) > 1 for _, owners in rows)
        assert sum(bad.values()) == len(rows) - len(alone)

    check()


@pytest.mark.parametrize(
    ("name", "values", "found"),
    [
        ("owner_ids", [["a"]], True),
        ("ownerIds", [["a"], None], True),
        ("AUTHORS", ['["a", "b"]'], True),
        ("co-authors", ["ann; bob"], True),
        ("participants", [[{"name": "ann"}]], True),
        ("authors", [[]], True),
        ("author", ["ann"], False),
        ("owner", [7], False),
        ("tags", [["a"]], False),
        ("authority", [["a"]], False),
    ],
)
def test_which_columns_look_like_owners(name, values, found) -> None:
    assert owner_columns({name: values, "text": ["x"]}) == ([name] if found else [])


RECORDS = [{"user_id": f"u{n}", "owner_ids": [f"u{n}", "u9"], "text": f"some text {n}"} for n in range(20)]


@pytest.fixture(params=["jsonl", "csv", "parquet", "hub", "hub saved"])
def with_owners(request, tmp_path) -> DataConfig:
    """Data with a column of owners that nobody declares."""
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / f"train.{request.param}"
    if request.param == "jsonl":
        write_jsonl(path, RECORDS)
    elif request.param == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(
                [list(RECORDS[0]), *([r["user_id"], json.dumps(r["owner_ids"]), r["text"]] for r in RECORDS)]
            )
    elif request.param == "hub saved":
        datasets.Dataset.from_list(RECORDS).save_to_disk(folder)
    else:
        pq.write_table(pa.Table.from_pylist(RECORDS), folder / "train.parquet")
    source = "hub" if request.param.startswith("hub") else "files"
    return DataConfig(source=source, path=str(folder), validation_fraction=0, test_fraction=0)


def test_undeclared_owners_are_in_the_manifest_and_in_words(with_owners, tmp_path, tokenizer) -> None:
    store = build_store(with_owners, tokenizer, tmp_path / "store")
    assert store.manifest["undeclared_owners"] == ["owner_ids"]
    (sentence,) = undeclared_owners(store.manifest)
    assert "'owner_ids'" in sentence
    assert "--data.owners-column owner_ids" in sentence
    assert sentence in in_words(store.manifest)


def test_declared_owners_are_no_doubt(tmp_path, tokenizer) -> None:
    records = [record | {"owner_ids": [record["user_id"]]} for record in RECORDS]
    path = write_jsonl(tmp_path / "d.jsonl", records)
    config = DataConfig(source="files", path=str(path), owners_column="owner_ids")
    store = build_store(config, tokenizer, tmp_path / "store")
    assert in_words(store.manifest) == []
    assert len(texts_by_user(store)) == 20


def test_training_on_a_store_begins_with_what_is_doubtful(tmp_path, tokenizer, monkeypatch, caplog) -> None:
    from fedsim.config import RunConfig
    from fedsim.models.config import ModelConfig
    from server import app

    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", RECORDS)
    (folder / "b.csv").write_text('user_id,text\nann,"hello there\nbob,size 5"\n')
    store = build_store(DataConfig(source="files", path=str(folder)), tokenizer, tmp_path / "store")
    loaded = SimpleNamespace(tokenizer=tokenizer, context=None, config=ModelConfig(), model=None, objective=None)
    monkeypatch.setattr("fedsim.resources.load_model", lambda *_, **__: loaded)
    monkeypatch.setattr(app, "_begin", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        app.train(None, RunConfig(data=DataConfig(source="store", path=str(store.path)), output=str(tmp_path / "run")))
    said = doubtful_owners(store.manifest)
    assert len(said) == 2
    assert [message for message in caplog.messages if message in said] == said


def test_owners_of_single_precision_are_known_as_such(tmp_path) -> None:
    """In lists, where two people may have had the number that is left, as in a column."""
    lists = pa.array([[16777217.0], [7.0], [7.1]], pa.list_(pa.float32()))
    table = pa.table({"user_id": ["16777216", "7", "7.1"], "text": ["one", "two", "three"], "owners": lists})
    pq.write_table(table, tmp_path / "train.parquet")
    for source, path in (("files", tmp_path / "train.parquet"), ("hub", tmp_path)):
        texts, bad = read_texts(DataConfig(source=source, path=str(path), owners_column="owners"))
        assert set(texts) == {"7", "7.1"}
        assert [reason for reason in bad if "digits are lost" in reason]
