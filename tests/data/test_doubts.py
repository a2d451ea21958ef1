"""What makes it doubtful that a user is a person is counted, and said by prepare."""

import pytest
from readable_stores import texts_by_user, write_jsonl

from experiments.run import main
from fedsim.data import spool
from fedsim.data.config import DataConfig
from fedsim.data.doubts import in_words, joined_rows
from fedsim.data.ingest import build_store
from fedsim.data.records import JOINED
from fedsim.models.tokenizer import train_tokenizer

LONG = "a text that is long enough to be nobody's by chance"


def of(*users: str) -> list[dict]:
    return [{"user_id": user, "text": f"text number {n}"} for n, user in enumerate(users)]


def test_ids_that_differ_by_blanks_or_composition_are_counted_or_unified(build) -> None:
    records = of("bob", " bob", "bob ", "Jos\u00e9", "Jose\u0301", "ann", "bob")
    apart = build(records)
    assert apart.num_users == 6
    found = apart.manifest["similar_users"]
    assert found.keys() == {"blanks or accents"}
    assert found["blanks or accents"]["users"] == 5
    assert found["blanks or accents"]["groups"] == 2
    (sentence,) = in_words(apart.manifest)
    assert "' bob' and 'bob" in sentence
    assert "--data.user-ids normalised" in sentence

    together = build(records, user_ids="normalised")
    assert sorted(texts_by_user(together)) == ["Jos\u00e9", "ann", "bob"]
    assert len(texts_by_user(together)["bob"]) == 4
    assert in_words(together.manifest) == []
    assert together.manifest["recipe"]["key"] != apart.manifest["recipe"]["key"]
    assert together.manifest["recipe"]["data"]["user_ids"] == "normalised"


def test_ids_that_differ_by_case_or_zeros_are_counted_and_stay_apart(build) -> None:
    store = build(of("007", "7", 7, "Bob", "bob", " BOB", "ann"), user_ids="normalised")
    assert store.num_users == 6
    assert store.manifest["similar_users"] == {
        "case or leading zeros": {"users": 5, "groups": 2, "examples": [["007", "7"], ["BOB", "bob"]]}
    }
    assert "'007' and '7'" in in_words(store.manifest)[0]


def test_similar_ids_are_found_across_parts(build, monkeypatch) -> None:
    monkeypatch.setattr("fedsim.data.spool.PART_RECORDS", 1)
    monkeypatch.setattr("fedsim.data.json_files.RECORDS_AT_ONCE", 1)
    store = build(of("bob", "ann", " bob", "ann"))
    assert store.manifest["similar_users"]["blanks or accents"]["users"] == 2


def test_ids_that_name_several_users_are_counted(build) -> None:
    store = build(of("ann", "bob", "ann;bob", "bob & cid", "x|y", "Smith, John"))
    assert store.manifest["joint_users"] == {"users": 2, "examples": ["ann;bob", "bob & cid"]}
    assert "'ann;bob', 'bob & cid'" in in_words(store.manifest)[0]


@pytest.mark.parametrize("count", [2, 3, 9])
def test_long_texts_that_many_users_have_are_counted(build, count) -> None:
    records = [{"user_id": f"u{user}", "text": text} for user in range(count) for text in (LONG, LONG, "short")]
    records += [{"user_id": "u0", "text": f"{LONG} {n}"} for n in range(20)]
    store = build(records)
    expected = {"texts": 1, "examples": 2 * count, "most_users": count} if count > 2 else {}
    assert store.manifest["shared_texts"] == expected
    assert len(in_words(store.manifest)) == bool(expected)


def test_nothing_doubtful_is_nothing_said(build) -> None:
    assert in_words(build(of("ann", "bob", "7", "8")).manifest) == []


def test_prepare_says_what_is_doubtful(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    train_tokenizer(["some text of nobody"] * 9, 300).save_pretrained(tmp_path / "model")
    records = [
        {"author": author, "text": text, "participants": [author, "someone"]}
        for author in ("bob", " bob", "ann", "ann;bob", "Ann")
        for text in (LONG, f"only of {author!r}")
    ]
    path = write_jsonl(tmp_path / "data.jsonl", records)
    arguments = ["prepare", "--data.source", "files", "--data.path", str(path), "--data.user-column", "author"]
    arguments += [
        "--model.path",
        str(tmp_path / "model"),
        "--data.validation-fraction",
        "0",
        "--data.test-fraction",
        "0",
    ]
    for _ in range(2):  # found in the cache the second time
        assert main(arguments) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Look at this: ")]
        for words in (
            "'participants'",
            "' bob' and 'bob'",
            "'Ann' and 'ann'",
            "'ann;bob'",
            "at most 5 users share one",
        ):
            assert sum(words in line for line in said) == 1, (words, said)


def test_an_interrupted_build_keeps_the_count_of_doubtful_rows(tmp_path, tokenizer, monkeypatch) -> None:
    """Those of parts that were finished before it, with their places; a row that is left out is not one of them."""
    monkeypatch.setattr(spool, "PART_RECORDS", 1)
    monkeypatch.setattr("fedsim.data.delimited.LINES_AT_ONCE", 1)
    folder = tmp_path / "data"
    folder.mkdir()
    rows = ['ann,"hello there\nbob,size 5"\n', 'cid,"one\ntwo"\n', 'NULL,"hello there\nbob,size 5"\n']
    for number in range(7):
        (folder / f"{number}.csv").write_text("user_id,text\n" + "".join(rows))

    config = DataConfig(source="files", path=str(folder), validation_fraction=0, test_fraction=0)

    class Interrupted(type(tokenizer)):
        left = 12

        def __call__(self, texts):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return super().__call__(texts)

    with pytest.raises(KeyboardInterrupt):
        build_store(config, Interrupted(), tmp_path / "store")
    assert len(list((tmp_path / "store.partial" / "parts").rglob("examples-*"))) >= 2
    store = build_store(config, tokenizer, tmp_path / "store")
    places = [f"{number}.csv:2" for number in range(5)]
    assert store.manifest["doubtful_rows"] == {JOINED: {"count": 7, "first": places}}
    (sentence,) = joined_rows(store.manifest)
    assert "7 (first: 0.csv:2, 1.csv:2" in sentence
    assert "--data.quotes none" in sentence
    assert sentence in in_words(store.manifest)
