"""Folders whose names say something, and folders that other libraries wrote."""

import json

import datasets
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from readable_stores import read_texts, texts_by_user, write_jsonl

from fedsim.data.config import DataConfig
from fedsim.data.folders import find_files, partition_of
from fedsim.data.ingest import build_store
from fedsim.data.sources import open_source
from fedsim.errors import InvalidInput

USERS = ["ann", "bob", "a b/c=d%", "7", "é"]
ROWS = [{"user": user, "year": 2020 + n % 2, "text": f"text {n}"} for n, user in enumerate(USERS * 2)]
EXPECTED = {user: {f"text {n}": 1, f"text {n + len(USERS)}": 1} for n, user in enumerate(USERS)}


def texts(path, **options):
    return read_texts(DataConfig(source="files", path=str(path), **options))


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_folders_of_arrow_are_columns(tmp_path, kind) -> None:
    pyarrow.dataset.write_dataset(
        pa.Table.from_pylist(ROWS),
        tmp_path / "data",
        format=kind,
        partitioning=["user", "year"],
        partitioning_flavor="hive",
    )
    for path in (tmp_path / "data", tmp_path / "data" / "*" / "*" / f"*.{kind}"):
        assert texts(path, user_column="user") == (EXPECTED, {})
    assert set(texts(tmp_path / "data", user_column="year")[0]) == {"2020", "2021"}


def test_json_lines_and_lists_in_folders(tmp_path) -> None:
    for user in ("ann", "bob"):
        (tmp_path / f"user={user}").mkdir()
    write_jsonl(tmp_path / "user=ann" / "part-0.jsonl", [{"text": "one"}, {"text": "two"}])
    (tmp_path / "user=bob" / "part-0.json").write_text('[{"text": "three"}, 5]')
    found, bad = texts(tmp_path, user_column="user")
    assert found == {"ann": {"one": 1, "two": 1}, "bob": {"three": 1}}
    assert bad == {"cannot be parsed": 1}


def test_a_folder_of_rows_without_a_value_has_no_user(tmp_path) -> None:
    table = pa.table({"user": ["ann", None], "text": ["one text", "two"]})
    pyarrow.dataset.write_dataset(
        table, tmp_path / "data", format="parquet", partitioning=["user"], partitioning_flavor="hive"
    )
    found, bad = texts(tmp_path / "data", user_column="user")
    assert (set(found), bad) == ({"ann"}, {"missing user": 1})


def test_a_column_that_folder_and_file_both_have_is_refused(tmp_path) -> None:
    (tmp_path / "user=ann").mkdir()
    for name, write in (("a.csv", "user,text\nbob,his text\n"), ("b.jsonl", '{"user": "bob", "text": "his"}\n')):
        file = tmp_path / "user=ann" / name
        file.write_text(write)
        with pytest.raises(InvalidInput, match=rf"data\.user-column is 'user'.*user=ann/{name} has 2 of that name"):
            texts(tmp_path, user_column="user")
        file.unlink()
    write_jsonl(tmp_path / "user=ann" / "c.jsonl", [{"text": "hers"}] * 5000 + [{"user": "bob", "text": "his"}])
    found, bad = texts(tmp_path, user_column="user")
    assert (found, bad) == ({"ann": {"hers": 5000}}, {"a key given twice": 1})


def test_a_folder_above_what_was_given_says_nothing_but_is_pointed_to(tmp_path) -> None:
    (tmp_path / "user=ann").mkdir()
    file = write_jsonl(tmp_path / "user=ann" / "a.jsonl", [{"text": "hers"}])
    for path in (file, tmp_path / "user=ann", tmp_path / "user=ann" / "*.jsonl"):
        with pytest.raises(InvalidInput, match="user=ann is named so: give the folder that it is in"):
            texts(path, user_column="user")


def test_one_column_twice_in_a_path_is_refused(tmp_path) -> None:
    folder = tmp_path / "user=ann" / "user=bob"
    folder.mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", [{"text": "whose?"}])
    with pytest.raises(InvalidInput, match="name each column once"):
        texts(tmp_path, user_column="user")


def test_names_of_folders_are_part_of_the_data(tmp_path) -> None:
    """Renaming a folder changes no file's name, size or time, and makes the text another's."""
    (tmp_path / "user=ann").mkdir()
    write_jsonl(tmp_path / "user=ann" / "a.jsonl", [{"text": "hers"}])
    config = DataConfig(source="files", path=str(tmp_path), user_column="user", text_column="text")
    before = open_source(config, tmp_path).identity
    (tmp_path / "user=ann").rename(tmp_path / "user=bob")
    assert open_source(config, tmp_path).identity != before
    assert set(texts(tmp_path, user_column="user")[0]) == {"bob"}


def test_what_names_without_a_column_say(tmp_path) -> None:
    file = tmp_path / "=x" / "plain" / "k=v=w" / "n=" / "a.csv"
    file.parent.mkdir(parents=True)
    file.touch()
    assert partition_of(file, str(tmp_path)) == {"k": "v=w", "n": None}


def test_bad_rows_in_folders_are_found_by_folder(tmp_path) -> None:
    (tmp_path / "user=ann").mkdir()
    write_jsonl(tmp_path / "user=ann" / "a.jsonl", [{"text": ""}])
    config = DataConfig(source="files", path=str(tmp_path), user_column="user", text_column="text")
    (chunk,) = open_source(config, tmp_path).read()
    assert chunk.position(0) == "user=ann/a.jsonl:1"


RECORDS = [{"user_id": user, "text": f"text {n}"} for n, user in enumerate("abcab")]


@pytest.mark.parametrize("source", ["files", "hub"])
def test_what_save_to_disk_wrote_is_read_from_either_source(tmp_path, tokenizer, source) -> None:
    data = datasets.Dataset.from_list(RECORDS)
    data.save_to_disk(tmp_path / "one")
    several = datasets.DatasetDict({"train": data, "dev": data.select([0, 1])})
    several.save_to_disk(tmp_path / "several")
    common = {"source": source, "validation_fraction": 0, "test_fraction": 0}
    for name in ("one", "several"):
        config = DataConfig(path=str(tmp_path / name), **common)
        assert texts_by_user(build_store(config, tokenizer, tmp_path / f"{name} store")) == {
            user: [record["text"] for record in RECORDS if record["user_id"] == user] for user in "abc"
        }
    config = DataConfig(path=str(tmp_path / "several"), hub_split="dev", **common)
    assert build_store(config, tokenizer, tmp_path / "dev store").num_users == 2
    with pytest.raises(InvalidInput, match=r"data\.hub-split is 'test'.*train, dev"):
        build_store(DataConfig(path=str(tmp_path / "several"), hub_split="test", **common), tokenizer, tmp_path / "no")


def test_a_folder_of_such_folders_names_one(tmp_path) -> None:
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "all" / "first")
    with pytest.raises(InvalidInput, match=r"save_to_disk wrote: name one of them, such as .*first"):
        find_files(str(tmp_path / "all"))


def test_hub_files_of_two_schemas_are_told_apart(tmp_path) -> None:
    for number, names in enumerate((["user_id", "text"], ["user_id", "text", "score"])):
        table = pa.table({name: ["x"] for name in names})
        pq.write_table(table, tmp_path / f"train-{number}.parquet")
    with pytest.raises(
        InvalidInput, match=r"same columns.*user_id, text and user_id, text, score.*--data\.source fil"
    ):
        read_texts(DataConfig(source="hub", path=str(tmp_path)))
    assert texts(tmp_path)[0] == {"x": {"x": 2}}


def test_statistics_beside_the_data_are_left_out_and_broken_ones_named(tmp_path) -> None:
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "stats.json").write_text(json.dumps({"rows": 5, "columns": ["user_id", "text"]}, indent=2))
    (tmp_path / "dataset_infos.json").write_text(json.dumps([{"rows": 5}]))
    found, bad = texts(tmp_path)
    assert (sum(map(len, found.values())), bad) == (5, {"file without the columns": 2})
    (tmp_path / "stats.json").write_text('[{"rows": 5')
    with pytest.raises(InvalidInput, match=r"stats\.json"):
        texts(tmp_path)
