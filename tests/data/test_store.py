import json
import pickle

import numpy as np
import pytest
from readable_stores import text_of, texts_by_user

from fedsim.data.store import UserStore, manifest_checksum
from fedsim.errors import InvalidInput
from fedsim.rows import IGNORED_LABEL


def many_users(count: int = 200) -> list[dict]:
    return [{"user_id": user, "text": f"text {user} {n}"} for n in range(3) for user in range(count) if n <= user % 3]


def test_every_user_has_its_own_rows_in_the_order_of_the_data(build) -> None:
    store = build(many_users())
    expected = {str(user): [f"text {user} {n}" for n in range(user % 3 + 1)] for user in range(200)}
    assert texts_by_user(store) == expected
    assert store.num_users == 200
    assert store.num_rows == sum(map(len, expected.values()))


def test_splits_are_ranges_that_share_no_user_and_cover_all(build) -> None:
    store = build(many_users(), validation_fraction=0.2, test_fraction=0.2)
    views = [store.split(name) for name in ("train", "validation", "test")]
    assert sum(view.num_users for view in views) == 200
    assert sum(view.num_rows for view in views) == store.num_rows
    assert sum(view.num_tokens for view in views) == store.num_tokens
    merged = {}
    for view in views:
        texts = texts_by_user(view)
        assert not merged.keys() & texts.keys()
        merged |= texts
        assert view.user_offsets[0] == 0
        assert view.user_offsets[-1] == view.num_rows == len(view.row_lengths)
    assert merged == texts_by_user(store)
    assert 90 < views[0].num_users < 150
    with pytest.raises(InvalidInput, match="train, validation, test"):
        store.split("dev")


def test_a_user_keeps_its_split_when_others_come_and_go(build) -> None:
    few = build(many_users(100), validation_fraction=0.3)
    many = build(many_users(200), validation_fraction=0.3)
    assert set(few.split("train").user_ids()) < set(many.split("train").user_ids())
    other = build(many_users(100), validation_fraction=0.3, split_seed=1)
    assert set(few.split("train").user_ids()) != set(other.split("train").user_ids())


def test_take_gives_rows_in_the_order_asked_for(build) -> None:
    view = build(many_users(), validation_fraction=0.5).split("validation")
    rows = view.take(np.array([5, 0, 5]))
    assert len(rows) == 3
    assert text_of(rows, 0) == text_of(rows, 2) == text_of(view.take([5]), 0)
    assert rows.lengths.tolist() == view.row_lengths[[5, 0, 5]].tolist()
    assert rows.labels is None
    assert rows.classes is None
    assert len(view.take([])) == 0
    for outside in (-1, view.num_rows):
        with pytest.raises(IndexError):
            view.take([outside])
    with pytest.raises(IndexError):
        view.rows_of(view.num_users)


def test_labels_become_classes(build) -> None:
    store = build(
        [{"user_id": "a", "text": f"text {n}", "kind": kind} for n, kind in enumerate([10, 9, 10])],
        label_column="kind",
    )
    assert store.classes == ["9", "10"]
    assert store.take([0, 1, 2]).classes.tolist() == [1, 0, 1]


def test_prompts_are_read_but_not_predicted(build) -> None:
    records = [{"user_id": "a", "ask": "What?", "text": "This."}, {"user_id": "a", "ask": None, "text": "No prompt"}]
    rows = build(records, prompt_column="ask").take([0, 1])
    assert text_of(rows, 0) == "What?This."
    assert rows.labels[:5].tolist() == [IGNORED_LABEL] * 5
    assert rows.labels[5:].tolist() == rows.tokens[5:].tolist()


def test_a_pickled_view_opens_the_same_users(build) -> None:
    view = build(many_users(), validation_fraction=0.3).split("validation")
    copy = pickle.loads(pickle.dumps(view))
    assert texts_by_user(copy) == texts_by_user(view)
    assert len(pickle.dumps(view)) < 1000


def test_tokens_take_the_narrowest_type(build) -> None:
    store = build(many_users(3))
    assert store._columns["token"].dtype == np.uint8


@pytest.mark.parametrize(
    "name", ["tokens.arrow", "starts.arrow", "lengths.arrow", "offsets.arrow", "users.arrow", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["missing", "short", "flipped"])
def test_a_damaged_store_is_refused(build, name: str, damage: str) -> None:
    path = build(many_users(20)).path
    content = bytearray((path / name).read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    (path / name).unlink()
    if damage != "missing":
        (path / name).write_bytes(content[:-8] if damage == "short" else content)
    with pytest.raises(InvalidInput, match="store"):
        UserStore.open(path)


def test_damage_in_a_large_file_is_found_on_request(build, monkeypatch) -> None:
    monkeypatch.setattr("fedsim.data.store.VERIFIED_ON_OPENING", 0)
    path = build(many_users(20)).path
    content = bytearray((path / "tokens.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "tokens.arrow").write_bytes(content)
    UserStore.open(path)
    with pytest.raises(InvalidInput, match=r"checksum of tokens\.arrow"):
        UserStore.open(path, verify=True)


def test_what_is_no_store_is_refused(tmp_path) -> None:
    with pytest.raises(InvalidInput, match="finished user store"):
        UserStore.open(tmp_path / "nothing")
    (tmp_path / "half.partial").mkdir()
    with pytest.raises(InvalidInput, match="interrupted"):
        UserStore.open(tmp_path / "half")


@pytest.mark.parametrize(
    ("known", "words"), [(1, "one user now, or none, may be"), (2, "one user now"), (3, "may lack .* special tokens")]
)
def test_a_store_of_an_earlier_format_is_refused_with_what_may_be_wrong(build, known, words) -> None:
    path = build(many_users(20)).path
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("crc32")
    manifest["format"] = known
    (path / "manifest.json").write_text(json.dumps(manifest | {"crc32": manifest_checksum(manifest)}))
    with pytest.raises(InvalidInput, match=rf"of format 4.*{words}"):
        UserStore.open(path)
