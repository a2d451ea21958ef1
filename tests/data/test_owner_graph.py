"""Examples of several owners in a store, and which of them are chosen so that nobody has too many."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readable_stores import LetterTokenizer, text_of, write_jsonl

from fedsim.data.config import DataConfig
from fedsim.data.greedy import chosen_rows
from fedsim.data.ingest import build_store
from fedsim.data.owners import BEGINS, BETWEEN, MIXED, OwnerSets, joint_name, owners_in, split_of
from fedsim.data.part import user_key
from fedsim.errors import InvalidInput
from fedsim.plan import ElsPlan, UlsPlan, UserSizes
from fedsim.plan.sizes import SharedSizes

PEOPLE = [f"user {n}" for n in range(12)]
SETS = st.lists(st.sets(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=20)


def graph_of(sets: list[set[int]], rows: list[int]) -> tuple[OwnerSets, np.ndarray]:
    names = [joint_name([f"u{owner}" for owner in owners]) for owners in sets]
    return OwnerSets.of_names(names), np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)


def owners_of_rows(sets: OwnerSets, offsets: np.ndarray) -> list[frozenset[int]]:
    members = [frozenset(sets.owners[a:b].tolist()) for a, b in zip(sets.offsets[:-1], sets.offsets[1:], strict=True)]
    return [members[place] for place in np.repeat(np.arange(len(members)), np.diff(offsets))]


@settings(max_examples=300)
@given(SETS, st.data(), st.integers(1, 5), st.sampled_from(["random", "first"]))
def test_nobody_has_too_many_and_nothing_more_could_be_chosen(sets, data, group_size, selection) -> None:
    rows = data.draw(st.lists(st.integers(0, 6), min_size=len(sets), max_size=len(sets)))
    graph, offsets = graph_of(sets, rows)
    chosen = chosen_rows(graph, offsets, group_size, selection)
    assert len(set(chosen.tolist())) == len(chosen)
    assert chosen.tolist() == sorted(chosen.tolist())
    owners = owners_of_rows(graph, offsets)
    has = np.zeros(graph.num_owners, dtype=int)
    for row in chosen:
        has[list(owners[row])] += 1
    assert has.max(initial=0) <= group_size
    for row in set(range(len(owners))) - set(chosen.tolist()):  # somebody who owns it has enough
        assert has[list(owners[row])].max() == group_size
    # In words of the rule: what was left out had an owner whose share was full of examples of no more owners.
    for row in set(range(len(owners))) - set(chosen.tolist()):
        before = np.zeros(graph.num_owners, dtype=int)
        for other in chosen:
            if len(owners[other]) <= len(owners[row]):
                before[list(owners[other])] += 1
        assert before[list(owners[row])].max() == group_size


@settings(max_examples=100)
@given(SETS, st.data(), st.integers(1, 4))
def test_the_choice_is_that_of_the_plain_rule(sets, data, group_size) -> None:
    """One example after the other, those of fewest owners first, in the order of the data."""
    rows = data.draw(st.lists(st.integers(0, 6), min_size=len(sets), max_size=len(sets)))
    graph, offsets = graph_of(sets, rows)
    owners = owners_of_rows(graph, offsets)
    left, expected = dict.fromkeys(range(graph.num_owners), group_size), []
    for row in sorted(range(len(owners)), key=lambda row: (len(owners[row]), row)):
        if all(left[owner] for owner in owners[row]):
            expected.append(row)
            left |= {owner: left[owner] - 1 for owner in owners[row]}
    assert chosen_rows(graph, offsets, group_size, "first").tolist() == sorted(expected)


def test_an_example_of_one_owner_comes_before_one_of_two() -> None:
    graph, offsets = graph_of([{0, 1}, {0}, {1}, {0, 1, 2}], [5, 2, 2, 5])
    assert chosen_rows(graph, offsets, 2).tolist() == [5, 6, 7, 8]
    assert len(chosen_rows(graph, offsets, 3)) == 5
    owners = owners_of_rows(graph, offsets)
    assert sorted(len(owners[row]) for row in chosen_rows(graph, offsets, 4)) == [1, 1, 1, 1, 2, 2]


def test_ties_are_broken_by_a_public_order_and_by_no_content() -> None:
    graph, offsets = graph_of([{0}, {1}], [50, 50])
    chosen = chosen_rows(graph, offsets, 5)
    assert chosen.tolist() == chosen_rows(graph, offsets, 5).tolist()
    assert chosen.tolist() != chosen_rows(graph, offsets, 5, "first").tolist()
    with pytest.raises(InvalidInput, match="follow from who owns what"):
        chosen_rows(graph, offsets, 5, "longest")
    with pytest.raises(InvalidInput, match="group-size"):
        chosen_rows(graph, offsets, 0)


@given(st.sets(st.text(min_size=1).filter(lambda name: not {BEGINS, BETWEEN} & set(name)), min_size=1, max_size=5))
def test_a_name_tells_its_owners(owners) -> None:
    assert owners_in(joint_name(owners)) == sorted(owners)


@settings(max_examples=60)
@given(st.integers(0, 1000), st.floats(0, 0.6), st.floats(0, 0.39))
def test_owners_are_in_the_splits_that_a_store_has_them_in(tmp_path_factory, seed, validation, test) -> None:
    folder = tmp_path_factory.mktemp("splits")
    path = write_jsonl(folder / "d.jsonl", [{"user_id": user, "text": "a text"} for user in PEOPLE])
    config = DataConfig(
        source="files", path=str(path), validation_fraction=validation, test_fraction=test, split_seed=seed
    )
    try:
        store = build_store(config, LetterTokenizer(), folder / "store")
    except InvalidInput:  # nobody is left for training
        assert all(split_of(user_key(user, seed), config) for user in PEOPLE)
        return
    for place, name in enumerate(("train", "validation", "test")):
        there = store.split(name).user_ids()
        assert sorted(there) == sorted(u for u in PEOPLE if split_of(user_key(u, seed), config) == place)


def records(count: int = 300) -> list[dict]:
    draw = np.random.default_rng(0)
    made = []
    for number in range(count):
        owners = [PEOPLE[n] for n in draw.choice(len(PEOPLE), size=draw.integers(1, 4), replace=False)]
        made.append({"user_id": owners[0], "owners": owners, "text": f"text {number} of {'+'.join(sorted(owners))}"})
    return made


@pytest.fixture
def config(tmp_path) -> DataConfig:
    path = write_jsonl(tmp_path / "d.jsonl", records())
    return DataConfig(source="files", path=str(path), owners_column="owners", several_owners="keep")


def test_each_example_is_stored_once_with_its_owners_in_their_split(config, tmp_path, tokenizer) -> None:
    store = build_store(config, tokenizer, tmp_path / "store")
    found, mixed = {}, 0
    for place, name in enumerate(("train", "validation", "test")):
        users = store.split(name)
        sets = users.owner_sets
        assert sets is not None
        assert sets.num_owners == len({owner for user in users.user_ids() for owner in owners_in(user)})
        for user, joint in enumerate(users.user_ids()):
            for row in range(*users.rows_of(user)):
                text = text_of(users.take(np.array([row])), 0)
                assert text not in found
                found[text] = owners_in(joint)
                assert {split_of(user_key(owner, 0), config) for owner in owners_in(joint)} == {place}
    for record in records():
        if len({split_of(user_key(owner, 0), config) for owner in record["owners"]}) == 1:
            assert found.pop(record["text"]) == sorted(record["owners"])
        else:
            mixed += 1
    assert found == {}
    assert mixed == store.manifest["bad_rows"][MIXED]["count"] > 0
    assert store.manifest["records"] == 300
    # They are no bad data: nothing is to be mended.
    assert build_store(dataclasses.replace(config, bad_rows="refuse"), tokenizer, tmp_path / "store").num_rows


def test_rows_of_a_long_example_share_its_owners(tmp_path, tokenizer) -> None:
    rows = [{"user_id": "ann", "owners": ["bob", "ann"], "text": "x" * 100 + "y" * 28}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    options = {"owners_column": "owners", "several_owners": "keep", "validation_fraction": 0, "test_fraction": 0}
    store = build_store(DataConfig(source="files", path=str(path), **options), tokenizer, tmp_path / "store")
    assert (store.num_users, store.num_rows) == (1, 2)
    assert owners_in(store.user_ids()[0]) == ["ann", "bob"]
    sizes = UserSizes.of_users(store.split("train"))
    assert (sizes.num_users, sizes.sizes.tolist(), sizes.kept(1), sizes.kept(5)) == (2, [2, 2], 1, 2)


def test_who_was_named_as_the_user_does_not_matter(config, tmp_path, tokenizer) -> None:
    """One person of several, and the order in which they are listed: all own it alike."""
    other = tmp_path / "other.jsonl"
    swapped = [r | {"user_id": r["owners"][-1], "owners": r["owners"][::-1]} for r in records()]
    write_jsonl(other, swapped)
    one, two = (
        build_store(dataclasses.replace(config, path=path), tokenizer, tmp_path / f"store of {n}")
        for n, path in enumerate((config.path, str(other)))
    )
    assert one.user_ids() == two.user_ids()
    assert one.fingerprint == two.fingerprint


@pytest.mark.parametrize("owner", ["a\x1fb", "\x1ea"])
def test_an_id_that_could_be_taken_for_several_is_refused(tmp_path, tokenizer, owner) -> None:
    rows = [{"user_id": "ann", "owners": ["ann", "bob"], "text": "a text"}]
    rows += [{"user_id": owner, "owners": listed, "text": "whose?"} for listed in (None, [owner], [owner, "ann"])]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    options = {"owners_column": "owners", "several_owners": "keep", "validation_fraction": 0, "test_fraction": 0}
    store = build_store(DataConfig(source="files", path=str(path), **options), tokenizer, tmp_path / "store")
    assert store.num_rows == 1
    assert [entry["count"] for reason, entry in store.manifest["bad_rows"].items() if "separator" in reason] == [3]


def test_a_store_of_single_owners_has_no_graph(tmp_path, tokenizer) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", records())
    config = DataConfig(source="files", path=str(path), owners_column="owners")
    store = build_store(config, tokenizer, tmp_path / "store")
    assert store.owner_sets is None
    assert not UserSizes.of_users(store.split("train")).several_owners


def test_owners_who_may_be_one_person_are_pointed_out(tmp_path, tokenizer) -> None:
    """Owners are compared, and not the sets of them, which differ anyway."""
    rows = [
        {"user_id": one, "owners": [one, two], "text": f"of {one}"} for one, two in (("Ann", "bob"), ("ann", "cy"))
    ]
    rows += [{"user_id": " cy", "owners": [" cy", "dee"], "text": "of cy"}, {"user_id": "eve", "text": "of eve"}]
    rows += [{"user_id": "bob;eve", "owners": ["bob;eve", "fay"], "text": "of whom?"}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    options = {"owners_column": "owners", "several_owners": "keep", "validation_fraction": 0, "test_fraction": 0}
    store = build_store(DataConfig(source="files", path=str(path), **options), tokenizer, tmp_path / "store")
    assert store.num_users == 5
    assert store.manifest["similar_users"] == {
        "blanks or accents": {"users": 2, "groups": 1, "examples": [[" cy", "cy"]]},
        "case or leading zeros": {"users": 2, "groups": 1, "examples": [["Ann", "ann"]]},
    }
    assert store.manifest["joint_users"] == {"users": 1, "examples": ["bob;eve"]}


@settings(max_examples=100)
@given(SETS, st.data(), st.integers(1, 4), st.sampled_from(["random", "first"]))
def test_how_many_rows_one_has_moves_no_row_of_those_who_share_none(sets, data, group_size, selection) -> None:
    """It follows from the lengths of their texts."""
    counts = st.lists(st.integers(0, 6), min_size=len(sets), max_size=len(sets))
    rows, before = data.draw(counts), data.draw(st.integers(0, len(sets)))
    sets, rows = list(dict.fromkeys(map(frozenset, sets))), rows[: len(set(map(frozenset, sets)))]
    before = min(before, len(sets))
    chosen = []
    for own in (0, 2, 50):
        graph, offsets = graph_of([*sets[:before], {99}, *sets[before:]], [*rows[:before], own, *rows[before:]])
        found = chosen_rows(graph, offsets, group_size, selection)
        at = np.searchsorted(offsets, found, side="right") - 1
        chosen.append({(int(s), int(r - offsets[s])) for s, r in zip(at, found, strict=True) if s != before})
    assert chosen[0] == chosen[1] == chosen[2]


def test_which_of_ones_rows_are_chosen_is_spread_over_all(tmp_path) -> None:
    graph, offsets = graph_of([{n} for n in range(400)], [20] * 400)
    places = chosen_rows(graph, offsets, 5) % 20
    assert np.abs(np.bincount(places, minlength=20) - 100).max() < 50  # of 8.7 standard deviations' probability


@pytest.mark.parametrize("kind", [ElsPlan, UlsPlan])
def test_plans_for_examples_of_one_owner_are_not_made_of_those_of_several(kind) -> None:
    sizes = SharedSizes.of_sets(*graph_of([{0}, {1}, {0, 1}], [5, 5, 5]))
    common = {"clip_norm": 1.0, "noise_multiplier": 1.0, "steps": 3, "delta": 1e-5}
    with pytest.raises(InvalidInput, match=r"plan\.adjacency.*fixed-graph.*several owners"):
        kind.draft(sizes, gradients_per_round=1, group_size=1, **common)
