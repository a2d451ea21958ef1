"""JSON files that are one value: a list of records, or LEAF's object of users."""

import gzip
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readable_stores import read_texts, texts_by_user, write_jsonl

from fedsim.data import json_files, json_stream
from fedsim.data.config import DataConfig
from fedsim.data.files import read_files
from fedsim.data.ingest import build_store
from fedsim.data.records import TWICE
from fedsim.errors import InvalidInput

WANTED = {"data.user-column": "user_id", "data.text-column": "text"}
RECORDS = [{"user_id": user, "text": f'line "{n}", [{{\nÜnïcode\\'} for n, user in enumerate("abcab")]


def records_of(path, wanted=WANTED) -> list[dict]:
    return [
        dict(zip(chunk.columns, row, strict=True))
        for chunk in read_files([path], wanted)
        for row in zip(*chunk.columns.values(), strict=True)
    ]


@pytest.fixture(params=[(1, 1), (7, 2), (1 << 18, 4096)], ids=["a byte", "seven bytes", "as it is"])
def blocks(request, monkeypatch) -> None:
    """How much is read at once, and how many records make a chunk."""
    monkeypatch.setattr(json_stream, "BLOCK", request.param[0])
    monkeypatch.setattr(json_files, "RECORDS_AT_ONCE", request.param[1])


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.json.gz"])
def test_a_list_of_records_is_read_as_lines_of_them_are(tmp_path, blocks, indent, name) -> None:
    content = ("\ufeff " + json.dumps(RECORDS, indent=indent, ensure_ascii=False) + "\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert records_of(tmp_path / name) == RECORDS
    assert [chunk.first for chunk in read_files([tmp_path / name], WANTED)][:2] in ([1], [1, 2], [1, 3])


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('"\\{}[],: é\n', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"[}\\', max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150)
@given(st.lists(values, max_size=5), st.sampled_from([1, 5, 1 << 18]), st.sampled_from([None, 1]))
def test_items_are_cut_where_the_grammar_cuts_them(tmp_path_factory, items, block, indent) -> None:
    path = tmp_path_factory.mktemp("list") / "d.json"
    path.write_text(json.dumps(items, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, path.open("rb") as file:
        patch.setattr(json_stream, "BLOCK", block)
        assert [json.loads(item) for item in json_stream.JsonStream(file, "d.json").elements()] == items


NAMES = ["ann", "bob", "eve"]
TEXTS = st.text('"{}[],: \\xu', max_size=12)
DAMAGE = st.sampled_from(['"', "{", "}", "[", "]", ",", "\\", ""])


@settings(max_examples=400)
@given(st.data(), st.lists(st.tuples(st.sampled_from(NAMES), TEXTS), min_size=2, max_size=6))
def test_no_damage_gives_anybody_anothers_text(tmp_path_factory, data, rows) -> None:
    """One character too many, too few or wrong: what is read before the file is refused is each one's own."""
    records = [{"user_id": user, "text": f"{user}{text}{user}"} for user, text in rows]
    content = json.dumps(records)
    place = data.draw(st.integers(0, len(content) - 1))
    content = content[:place] + data.draw(DAMAGE) + content[place + data.draw(st.integers(0, 1)) :]
    path = tmp_path_factory.mktemp("damaged") / "d.json"
    path.write_text(content, encoding="utf-8")
    read = []
    try:
        for chunk in read_files([path], WANTED):
            read += zip(chunk.columns["user_id"], chunk.columns["text"], strict=True)
    except InvalidInput:
        pass
    for user, text in read:
        if isinstance(user, str) and isinstance(text, str) and user in NAMES:
            assert not any(name in text for name in NAMES if name != user)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"user_id": "a", "text": "b"}', "',' or ']' was expected"),
        ('[{"user_id": "a", "text": "b"', "breaks off"),
        ('[{"user_id": "a", "text": "b"}] [1]', "after the end"),
        ('[{"user_id": "a", "text": "b"}, {"user_id": "a" "text"}]', "Item 2 of its list"),
        ('[{"user_id": "a", "text": "b"},]', "no value"),
    ],
)
def test_what_is_not_json_to_its_end_is_refused_with_a_way_out(tmp_path, content, words) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(InvalidInput, match=rf"data\.json.*{re.escape(words)}.*JSON lines"):
        list(read_files([path], WANTED))


def test_items_that_are_no_records_are_bad_rows(tmp_path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"user_id": "a", "text": "fine"}, 5, null, {"user_id": "a", "user_id": "b", "text": "x"}]')
    texts, bad = read_texts(DataConfig(source="files", path=str(path)))
    assert {user: list(own) for user, own in texts.items()} == {"a": ["fine"]}
    assert bad == {"cannot be parsed": 2, TWICE.reason: 1}


def test_an_item_without_end_takes_no_more_memory_than_the_largest(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(json_stream, "LARGEST", 1000)
    monkeypatch.setattr(json_stream, "BLOCK", 100)
    path = tmp_path / "data.json"
    path.write_text('[{"user_id": "a", "text": ["' + "x" * 100_000 + '"]}]')
    with pytest.raises(InvalidInput, match="An item of it has more than"):
        list(read_files([path], WANTED))


# As the programs of the benchmark write them, in small.
SHAKESPEARE = {"MACBETH": {"x": ["Tomorrow, and tomorro", "omorrow, and tomorrow"], "y": ["w", ","]}}
SENT140 = {"ann": {"x": [["1", "Mon Apr 06", "NO_QUERY", "ann", "so happy today"]], "y": [1]}}
REDDIT = {
    "bob": {
        "x": [[["<BOS>", "hello", "there"], ["my", "friend", "<EOS>"]], [["<BOS>", "bye", "<EOS>", "<PAD>"]]],
        "y": [{"target_tokens": [["hello"]], "count_tokens": [[1]]}, {"target_tokens": [["bye"]]}],
    }
}


def write_leaf(path, data: dict, **more):
    whole = {"users": list(data), "num_samples": [len(d.get("y", [])) for d in data.values()], **more}
    path.write_text(json.dumps(whole | {"user_data": data}))
    return path


def texts_in(path, **options) -> dict[str, list[str]]:
    texts, bad = read_texts(DataConfig(source="files", path=str(path), **options))
    assert bad == {}
    return {user: list(own) for user, own in texts.items()}


def test_leafs_form(tmp_path, blocks) -> None:
    data = SHAKESPEARE | REDDIT
    path = write_leaf(tmp_path / "all_data_0_niid_05.json", data, hierarchies=[["PLAY"], [5]])
    expected = {"MACBETH": SHAKESPEARE["MACBETH"]["x"], "bob": ["hello there my friend", "bye"]}
    assert texts_in(path) == expected
    path.write_text(json.dumps({"user_data": data, "users": []}, indent=1))
    assert texts_in(path) == expected


def test_the_fields_of_leafs_examples_are_columns(tmp_path, tokenizer) -> None:
    path = write_leaf(tmp_path / "tweets.json", SENT140 | {"bob": {"x": [["2", "", "", "bob", "oh no"]], "y": [0]}})
    config = DataConfig(source="files", path=str(path), text_column="x.4", label_column="y")
    with pytest.raises(InvalidInput, match="enough text"):  # the list is none
        build_store(DataConfig(source="files", path=str(path)), tokenizer, tmp_path / "none")
    store = build_store(
        DataConfig(**vars(config) | {"validation_fraction": 0, "test_fraction": 0}), tokenizer, tmp_path / "s"
    )
    assert texts_by_user(store) == {"ann": ["so happy today"], "bob": ["oh no"]}
    assert store.classes == ["0", "1"]
    with pytest.raises(InvalidInput, match=r"tweets\.json: text, x, y, user_id"):
        list(read_files([path], {"data.user-column": "author"}))
    played = write_leaf(tmp_path / "raw.json", {"MACBETH": {"raw": "Tomorrow, and tomorrow"}})
    assert texts_in(played, text_column="raw") == {"MACBETH": ["Tomorrow, and tomorrow"]}


def test_examples_without_their_counterparts_are_bad_rows(tmp_path) -> None:
    data = {"ann": {"x": ["one text", "two"], "y": [1]}, "bob": {"x": ["his text"], "y": [0]}, "eve": 5}
    path = write_leaf(tmp_path / "d.json", {n: d for n, d in data.items() if n != "eve"})
    path.write_text(path.read_text().replace('"user_data": {', '"user_data": {"eve": 5, '))
    texts, bad = read_texts(DataConfig(source="files", path=str(path), text_column="x", prompt_column="y"))
    assert bad == {
        "lists of different lengths for one user": 2,
        "cannot be parsed": 1,
        "prompt of the wrong type (int)": 1,
    }
    texts, bad = read_texts(DataConfig(source="files", path=str(path)))
    assert set(texts) == {"ann", "bob"}


def test_lines_with_columns_called_as_leafs_are_lines(tmp_path) -> None:
    rows = [{"users": ["ann"], "num_samples": [1], "user_id": "ann", "text": "a text"}] * 2
    path = write_jsonl(tmp_path / "d.json", rows)
    assert texts_in(path, owners_column="users") == {"ann": ["a text"]}


@pytest.mark.parametrize(
    "inner", [{"p": {"text": "about"}}, {"id": "a"}, {}, {"x": ["a"]}, {"p": {"x": "about"}}, {"p": {}}]
)
@pytest.mark.parametrize("place", ["first", "last"])
def test_lines_with_a_column_called_user_data_are_lines(tmp_path, blocks, inner, place) -> None:
    """Each is read, and none of it goes to whom the keys in that column would name."""
    rows = [{"user_id": user, "text": f"by {user}"} for user in "abc"]
    rows = [{"user_data": inner} | row if place == "first" else row | {"user_data": inner} for row in rows]
    assert texts_in(write_jsonl(tmp_path / "d.jsonl", rows)) == {user: [f"by {user}"] for user in "abc"}


LEAF_OBJECTS = [json.dumps({"users": [u], "user_data": {u: {"x": [f"by {u}"], "y": [0]}}}) for u in "ab"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("\n".join(LEAF_OBJECTS), "goes on after the end"),
        (LEAF_OBJECTS[0] + " garbage", "goes on after the end"),
        ('{"user_data": {"a": {"x": ["by a"]}}}\n{"user_data": {"b": {"x": ["by b"]}}}\n', "goes on after the end"),
        (
            '{"users": ["a"], "user_data": {"p": {"text": "about a"}}, "user_id": "a", "text": "by a"}',
            "column 'user_id'",
        ),
        ('{"user_data": {"p": {"x": ["about a"]}}, "text": "by a", "user_id": "a"}', "column 'text'"),
    ],
)
def test_what_may_be_leafs_or_lines_is_refused(tmp_path, blocks, content, words) -> None:
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(InvalidInput, match=rf"d\.json.*{words}"):
        read_texts(DataConfig(source="files", path=str(tmp_path / "d.json")))
