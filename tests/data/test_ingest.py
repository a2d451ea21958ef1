import errno
import json

import duckdb
import pytest
from readable_stores import texts_by_user, write_jsonl

from fedsim.data import ingest, spool
from fedsim.data.config import DataConfig
from fedsim.data.ingest import build_store, open_or_build
from fedsim.data.part import PartWriter
from fedsim.data.store import MANIFEST, UserStore
from fedsim.data.write import StoreWriter
from fedsim.errors import InvalidInput

BAD_LINES = b"""\
{"user_id": "a", "text": "good text"}
{"user_id": null, "text": "nobody's"}
{"text": "nobody's either"}
{"user_id": "a", "text": ""}
{"user_id": "a", "text": " \\n "}
{"user_id": "a", "text": 17}
{"user_id": ["a"], "text": "whose?"}
not json
{"user_id": "a", "text": "broken \xff\xfe bytes"}
{"user_id": "b", "text": "lone \\ud800 surrogate"}
[1, 2]
{"user_id": "a"}
{"user_id": "b", "text": "another good"}
"""
BAD_REASONS = {
    "missing user": 2,
    "empty text": 2,
    "text of the wrong type (int)": 1,
    "user of the wrong type (list)": 1,
    "cannot be parsed": 2,
    "invalid UTF-8 (or another encoding: data.encoding)": 2,
    "missing text": 1,
}


def files(path, **options) -> DataConfig:
    return DataConfig(source="files", path=str(path), **({"validation_fraction": 0, "test_fraction": 0} | options))


def test_bad_rows_are_counted_by_reason_and_skipped(tmp_path, tokenizer) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(BAD_LINES)
    store = build_store(files(path), tokenizer, tmp_path / "store")
    assert texts_by_user(store) == {"a": ["good text"], "b": ["another good"]}
    bad = store.manifest["bad_rows"]
    assert {reason: entry["count"] for reason, entry in bad.items()} == BAD_REASONS
    assert bad["cannot be parsed"]["first"] == ["data.jsonl:8", "data.jsonl:11"]
    assert store.manifest["records"] == 13


def test_bad_rows_are_refused_on_request(tmp_path, tokenizer) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(BAD_LINES)
    with pytest.raises(InvalidInput, match=r"data\.jsonl:\d+"):
        build_store(files(path, bad_rows="refuse"), tokenizer, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    build_store(files(path), tokenizer, tmp_path / "store")
    with pytest.raises(InvalidInput, match=r"data\.jsonl:\d+"):
        build_store(files(path, bad_rows="refuse"), tokenizer, tmp_path / "store")


def test_only_the_first_positions_are_kept(tmp_path, tokenizer) -> None:
    records = [{"user_id": "a", "text": "good text"}] + [{"user_id": "a", "text": ""}] * 5000
    store = build_store(files(write_jsonl(tmp_path / "d.jsonl", records)), tokenizer, tmp_path / "store")
    assert store.manifest["bad_rows"]["empty text"]["count"] == 5000
    assert store.manifest["bad_rows"]["empty text"]["first"] == [f"d.jsonl:{line}" for line in range(2, 7)]


UNCLOSED = b"""\
user_id,text
ann,hello there my dear friend
bob,"she said and never closed it
cid,cid wrote this
dan,dan wrote that
"""


def test_an_unclosed_quote_gives_nobody_anothers_text(tmp_path, tokenizer) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(UNCLOSED)
    store = build_store(files(path), tokenizer, tmp_path / "store")
    assert texts_by_user(store) == {"ann": ["hello there my dear friend"]}
    ((reason, entry),) = store.manifest["bad_rows"].items()
    assert "quotes" in reason
    assert entry == {"count": 3, "first": ["data.csv:3", "data.csv:4", "data.csv:5"]}
    assert store.manifest["records"] == 4
    with pytest.raises(InvalidInput, match=r"data\.csv:3.*quotes that do not match.*--data\.quotes none"):
        build_store(files(path, bad_rows="refuse"), tokenizer, tmp_path / "refused")
    letters = build_store(files(path, quotes="none"), tokenizer, tmp_path / "letters")
    assert set(letters.user_ids()) == {"ann", "bob", "cid", "dan"}


@pytest.mark.parametrize("header", ["user_id,text", "text,user_id"])
def test_an_unquoted_comma_invents_no_user_and_cuts_no_text(tmp_path, tokenizer, header) -> None:
    rows = [("ann", "I was out, then I came home again"), ("bob", "all is well")]
    lines = [",".join(row if header.startswith("user") else row[::-1]) for row in rows]
    path = tmp_path / "data.csv"
    path.write_text("\n".join([header, *lines, ""]))
    store = build_store(files(path), tokenizer, tmp_path / "store")
    assert texts_by_user(store) == {"bob": ["all is well"]}
    assert store.manifest["bad_rows"] == {
        "more or fewer fields than the header": {"count": 1, "first": ["data.csv:2"]}
    }


def test_rows_of_several_owners_are_dropped(build) -> None:
    owners = [["a"], ["a", "b"], ["a", "a"], None]
    records = [{"user_id": "a", "text": f"text {n}", "owners": names} for n, names in enumerate(owners)]
    store = build(records, owners_column="owners")
    assert texts_by_user(store) == {"a": ["text 0", "text 2", "text 3"]}
    assert store.manifest["bad_rows"]["several owners"]["count"] == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["abcdefgh", "ijklmnop", "qrst", "short", "short"]),
        ({"deduplicate": True}, ["abcdefgh", "ijklmnop", "qrst", "short"]),
        ({"minimum_tokens": 5}, ["abcdefgh", "ijklmnop", "short", "short"]),
        ({"long_texts": "truncate"}, ["abcdefgh", "short", "short"]),
        ({"long_texts": "pack", "minimum_tokens": 2}, ["abcdefgh", "ijklmnop", "qrstshor", "tshort"]),
        ({"end_of_text": True, "long_texts": "truncate"}, ["abcdefgh", "short\0", "short\0"]),
    ],
)
def test_texts_are_cut_into_rows(build, options, expected) -> None:
    records = [{"user_id": "a", "text": text} for text in ("abcdefghijklmnopqrst", "short", "short")]
    records.insert(1, {"user_id": "b", "text": "between"})
    store = build(records, **({"sequence_length": 8, "deduplicate": False} | options))
    assert texts_by_user(store)["a"] == expected


def test_duplicates_of_other_users_and_other_labels_stay(build) -> None:
    records = [{"user_id": user, "text": "same", "label": label} for user in "ab" for label in (0, 1, 0)]
    store = build(records, label_column="label")
    assert texts_by_user(store) == {"a": ["same"] * 2, "b": ["same"] * 2}
    assert store.manifest["duplicates"] == 2


def test_a_piece_with_nothing_to_predict_is_dropped(build) -> None:
    store = build([{"user_id": "a", "p": "12345678abcd", "text": "efgh"}], prompt_column="p", sequence_length=8)
    rows = store.take([0])
    assert store.num_rows == 1
    assert rows.labels.tolist() == [-100] * 4 + list(b"efgh")


def test_users_with_too_few_rows_are_dropped(build) -> None:
    records = [{"user_id": user, "text": f"text {n}"} for user, count in (("a", 3), ("b", 1)) for n in range(count)]
    assert build(records, minimum_rows=2).user_ids() == ["a"]


def test_users_of_any_type(build) -> None:
    records = [{"user_id": user, "text": f"text {n}"} for n, user in enumerate([7, 7.0, "7", "x", 2**60 + 1])]
    store = build(records)
    assert set(store.user_ids()) == {"7", "x", str(2**60 + 1)}
    assert len(texts_by_user(store)["7"]) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"user_column": "author"}, ["data.user-column", "'author'", "user_id, text"]),
        ({"text_column": "body"}, ["data.text-column", "'body'", "user_id, text"]),
        ({"label_column": "class"}, ["data.label-column", "'class'"]),
        ({"minimum_tokens": 30}, ["enough text", "data.minimum-tokens"]),
        ({"minimum_rows": 9}, ["enough text", "data.minimum-rows"]),
    ],
)
def test_what_a_person_can_correct_is_named(build, options, words) -> None:
    with pytest.raises(InvalidInput) as error:
        build([{"user_id": "a", "text": "some text"}], **options)
    assert all(word in str(error.value) for word in words)


def test_a_missing_path_is_named(tmp_path, tokenizer) -> None:
    with pytest.raises(InvalidInput, match=r"data\.path.*Nothing exists"):
        build_store(files(tmp_path / "none.jsonl"), tokenizer, tmp_path / "store")


def test_the_second_call_opens_what_the_first_built(tmp_path, tokenizer, monkeypatch) -> None:
    config = files(write_jsonl(tmp_path / "d.jsonl", [{"user_id": "a", "text": "some text"}]))
    first = open_or_build(config, tokenizer, tmp_path / "cache")
    monkeypatch.setattr(ingest, "spool", None)
    second = open_or_build(config, tokenizer, tmp_path / "cache")
    assert (second.path, second.fingerprint) == (first.path, first.fingerprint)


def test_other_settings_data_or_tokenizer_build_another_store(tmp_path, tokenizer) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"user_id": "a", "text": "some text"}])
    paths = {open_or_build(files(path), tokenizer, tmp_path / "cache").path}
    paths.add(open_or_build(files(path, sequence_length=8), tokenizer, tmp_path / "cache").path)
    paths.add(open_or_build(files(path), lambda texts: [[1, 2, 3, 4, 5]] * len(texts), tmp_path / "cache").path)
    write_jsonl(path, [{"user_id": "a", "text": "some longer text"}])
    paths.add(open_or_build(files(path), tokenizer, tmp_path / "cache").path)
    assert len(paths) == 4


def test_memory_limit_does_not_change_the_store(tmp_path, tokenizer) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"user_id": "a", "text": "some text"}])
    small = open_or_build(files(path, memory_limit="200MB"), tokenizer, tmp_path / "cache")
    assert small.path == open_or_build(files(path), tokenizer, tmp_path / "cache").path


def test_an_output_that_holds_something_else_is_left_alone(tmp_path, tokenizer) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"user_id": "a", "text": "some text"}])
    store = build_store(files(path), tokenizer, tmp_path / "store")
    assert build_store(files(path), tokenizer, tmp_path / "store").fingerprint == store.fingerprint
    with pytest.raises(InvalidInput, match="other data, settings or tokenizer"):
        build_store(files(path, sequence_length=8), tokenizer, tmp_path / "store")
    with pytest.raises(InvalidInput, match="output"):
        build_store(files(path), tokenizer, tmp_path)
    with pytest.raises(InvalidInput, match="folder that can be written"):
        build_store(files(path), tokenizer, path / "store")


@pytest.mark.parametrize("where", ["spool", "finish"])
def test_an_interrupted_build_goes_on_and_is_never_opened_before(tmp_path, tokenizer, monkeypatch, where) -> None:
    monkeypatch.setattr(spool, "PART_RECORDS", 4096)
    records = [{"user_id": f"u{n % 50}", "text": f"text number {n}"} for n in range(20_000)]
    config = files(write_jsonl(tmp_path / "d.jsonl", records))
    encoded = []

    class Interrupted(type(tokenizer)):
        limit = 10_000 if where == "spool" else 10**9

        def __call__(self, texts):
            encoded.append(len(texts))
            if sum(encoded) > self.limit:
                raise KeyboardInterrupt
            return super().__call__(texts)

    with monkeypatch.context() as patched:
        if where == "finish":
            patched.setattr(StoreWriter, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_store(config, Interrupted(), tmp_path / "store")
    with pytest.raises(InvalidInput, match="interrupted"):
        UserStore.open(tmp_path / "store")
    before = sum(encoded)
    Interrupted.limit = 10**9
    store = build_store(config, Interrupted(), tmp_path / "store")
    probe = 3  # texts that tell one tokenizer from another
    assert sum(encoded) - before == probe + (20_000 - 2 * 4096 if where == "spool" else 0)
    whole = build_store(config, tokenizer, tmp_path / "whole")
    assert store.fingerprint == whole.fingerprint
    assert not (tmp_path / "store.partial").exists()


def test_a_store_is_the_same_however_the_data_is_cut_into_parts(tmp_path, tokenizer, monkeypatch) -> None:
    records = [{"user_id": f"u{n % 7}", "text": f"text number {n}"} for n in range(10_000)]
    config = files(write_jsonl(tmp_path / "d.jsonl", records), sequence_length=8)
    whole = build_store(config, tokenizer, tmp_path / "whole")
    monkeypatch.setattr(spool, "PART_RECORDS", 1)
    monkeypatch.setattr("fedsim.data.group.EXAMPLES_AT_ONCE", 100)
    parts = build_store(config, tokenizer, tmp_path / "parts")
    assert whole.fingerprint == parts.fingerprint
    assert sum(map(len, texts_by_user(parts).values())) == whole.num_rows


@pytest.mark.parametrize("at_once", [1000, 2048, 3000, 4096])
def test_users_may_end_where_a_batch_ends(build, monkeypatch, at_once) -> None:
    monkeypatch.setattr("fedsim.data.group.EXAMPLES_AT_ONCE", at_once)
    records = [{"user_id": f"u{user}", "text": f"text {n}"} for user in range(4) for n in range(4096)]
    store = build(records)
    assert store.num_rows == len(records)
    texts = texts_by_user(store)
    assert {user: len(rows) for user, rows in texts.items()} == {f"u{user}": 4096 for user in range(4)}
    assert all(rows == [f"text {n}" for n in range(4096)] for rows in texts.values())


def test_the_manifest_says_what_is_in_the_store(build) -> None:
    records = [{"user_id": f"u{user}", "text": f"text {n}"} for user in range(10) for n in range(user + 1)]
    store = build(records)
    manifest = json.loads((store.path / MANIFEST).read_text())
    assert manifest["num_users"] == 10
    assert manifest["num_rows"] == 55
    assert manifest["rows_per_user"] == {"minimum": 1, "median": 5, "p90": 9, "p99": 9, "maximum": 10}
    assert manifest["recipe"]["data"]["text_column"] == "text"
    assert manifest["vocabulary_size"] == 256


def test_a_prepared_store_is_used_as_it_is(build, tokenizer) -> None:
    store = build([{"user_id": "a", "text": "some text"}])
    config = DataConfig(source="store", path=str(store.path))
    assert open_or_build(config, tokenizer).fingerprint == store.fingerprint
    with pytest.raises(InvalidInput, match="model's own tokenizer"):
        open_or_build(config, lambda texts: [[1]] * len(texts))
    with pytest.raises(InvalidInput, match=r"data\.sequence-length"):
        DataConfig(source="store", path=str(store.path), sequence_length=8)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, tokenizer) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"user_id": "a", "text": "enough text"}])
    config = DataConfig(source="files", path=str(path), validation_fraction=0, test_fraction=0)
    (tmp_path / "file").write_text("where a folder should be")
    with pytest.raises(InvalidInput, match=r"FEDSIM_CACHE is .*file'.*Set the environment variable"):
        open_or_build(config, tokenizer, tmp_path / "file")
    with pytest.raises(InvalidInput, match="output is"):
        build_store(config, tokenizer, tmp_path / "file" / "store", tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    ("kind", "arguments"), [(OSError, (errno.ENOSPC, "No space left")), (duckdb.IOException, ("No space left",))]
)
def test_a_full_disk_is_told_in_one_sentence_and_the_build_goes_on(
    tmp_path, tokenizer, monkeypatch, kind, arguments
) -> None:
    config = files(write_jsonl(tmp_path / "data.jsonl", [{"user_id": "a", "text": "enough text"}]))

    def full(*_):
        raise kind(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "finish", full)
        with pytest.raises(InvalidInput, match=r"FEDSIM_CACHE is .*cache'.*enough space.*goes on where it stopped"):
            open_or_build(config, tokenizer, tmp_path / "cache")
        with pytest.raises(InvalidInput, match=r"output is .*store'.*enough space"):
            build_store(config, tokenizer, tmp_path / "store", tmp_path / "cache")
    monkeypatch.setattr(PartWriter, "write", None)
    assert open_or_build(config, tokenizer, tmp_path / "cache").num_users == 1


def test_other_errors_of_the_system_are_not_taken_for_a_full_disk(tmp_path, tokenizer, monkeypatch) -> None:
    config = files(write_jsonl(tmp_path / "data.jsonl", [{"user_id": "a", "text": "enough text"}]))

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(StoreWriter, "finish", broken)
    with pytest.raises(OSError, match="Input/output error"):
        open_or_build(config, tokenizer, tmp_path / "cache")
