"""How many users own how much: written once, and never counted again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data import write
from fedsim.data.shape import Examples
from fedsim.data.store import MANIFEST, UserStore, manifest_checksum
from fedsim.data.write import StoreWriter
from fedsim.errors import InvalidInput
from fedsim.plan import ElsPlan, UserSizes
from fedsim.rows import SizeCounts

OWNED = (3, 1, 1, 7, 2, 1, 4)
SPLITS = {"train": [0, 4], "validation": [4, 6], "test": [6, 7]}


def written(folder: Path) -> UserStore:
    """Users of so many rows, the last one of nine tokens, the others of two."""
    folder.mkdir()
    writer = StoreWriter(folder, np.dtype(np.uint16))
    for part in (slice(0, 3), slice(3, 7)):
        owned = np.array(OWNED[part])
        lengths = np.full(owned.sum(), 2)
        lengths[-1] += 7 * (part.start == 3)
        keys = np.stack([np.arange(part.start, part.stop), np.zeros(len(owned))], axis=1).astype(np.uint64)
        tokens = np.full(lengths.sum(), 5 - part.start, dtype=np.uint16)
        writer.append(keys, Examples(tokens=tokens, lengths=lengths, users=np.repeat(np.arange(len(owned)), owned)))
    names = pa.table({"user": pa.array([f"u{user}" for user in range(len(OWNED))])})
    writer.finish(names, SPLITS, {"classes": [], "tokenizer": "none"})
    return UserStore.open(folder)


def rewrite(folder: Path, **changes: Any) -> UserStore:
    """The same store with another manifest; None leaves an entry out."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["crc32"]
    manifest = {name: value for name, value in (manifest | changes).items() if value is not None}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"crc32": manifest_checksum(manifest)}))
    return UserStore.open(folder)


def forbidden(*_: object) -> None:
    raise AssertionError("every user was looked at")


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_a_store_says_what_counting_would_find(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "COUNTS_AT_ONCE", at_once)
    store = written(tmp_path / "store")
    assert store.manifest["rows_per_user"] == {"minimum": 1, "median": 2, "p90": 5, "p99": 6, "maximum": 7}
    assert store.longest_row == 9 == store.row_lengths.max()
    assert store.largest_token == 5 == store.take(np.arange(store.num_rows)).tokens.max()
    counted = {name: SizeCounts.counted(np.diff(store.split(name).user_offsets)) for name in SPLITS}
    monkeypatch.setattr(UserStore, "user_offsets", property(forbidden))
    monkeypatch.setattr(UserStore, "row_lengths", property(forbidden))
    for name, right in counted.items():
        said = SizeCounts.of(store.split(name))
        assert (said.sizes.tolist(), said.users.tolist()) == (right.sizes.tolist(), right.users.tolist())
    train = store.split("train")
    assert UserSizes.of_users(train).kept(2) == 2 + 1 + 1 + 2 == plan().on(train).num_examples
    opened = UserStore.open(tmp_path / "store")
    assert (opened.longest_row, opened.largest_token) == (9, 5)


def plan() -> ElsPlan:
    return ElsPlan(
        num_examples=1,
        group_size=2,
        sampling_probability=0.5,
        clip_norm=1.0,
        noise_multiplier=1.0,
        steps=1,
        delta=1e-5,
    )


def test_stores_that_do_not_say_are_counted(tmp_path: Path) -> None:
    said = written(tmp_path / "store")
    silent = rewrite(tmp_path / "store", users_by_rows=None, longest_row=None, largest_token=None)
    assert silent.fingerprint == said.fingerprint
    assert silent.split("train").size_counts is None
    assert silent.size_counts is said.size_counts is None, "the whole store is no split"
    assert (silent.longest_row, silent.largest_token) == (9, 5)
    for name in SPLITS:
        ours, theirs = SizeCounts.of(silent.split(name)), SizeCounts.of(said.split(name))
        np.testing.assert_array_equal(ours.sizes, theirs.sizes)
        np.testing.assert_array_equal(ours.users, theirs.users)


@pytest.mark.parametrize("wrong", [{"1": 2, "3": 1}, {"1": 3, "7": 1}])
def test_counts_of_other_users_are_refused(wrong: dict[str, int], tmp_path: Path) -> None:
    written(tmp_path / "store")
    with pytest.raises(InvalidInput, match="counts other users of train"):
        SizeCounts.of(rewrite(tmp_path / "store", users_by_rows={"train": wrong}).split("train"))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.floats(0, 1), st.integers(1, 70))
def test_counts_tell_what_all_users_sizes_tell(owned: list[int], level: float, group_size: int) -> None:
    counts = SizeCounts.counted(np.array(owned))
    sizes = UserSizes(num_users=len(owned), sizes=counts.sizes, users=counts.users, source="a test", private=False)
    assert sizes.quantile(level) == float(np.quantile(owned, level))
    assert sizes.median == int(np.median(owned))
    assert sizes.kept(group_size) == counts.kept(group_size) == np.minimum(owned, group_size).sum()
    assert (counts.num_users, counts.largest) == (len(owned), max(owned))
    some = np.array_split(np.array(owned), 3)
    joined = SizeCounts.joined([SizeCounts.counted(part) for part in some])
    assert (joined.sizes.tolist(), joined.users.tolist()) == (counts.sizes.tolist(), counts.users.tolist())
    alike = UserSizes(num_users=len(owned), sizes=np.sort(owned), source="a test", private=False)
    assert (alike.quantile(level), alike.median, alike.kept(group_size)) == (
        sizes.quantile(level),
        sizes.median,
        sizes.kept(group_size),
    )
