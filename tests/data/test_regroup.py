"""Made-up users of known diversity: what moves, what stays, and that no guarantee is claimed for a person."""

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from readable_stores import write_jsonl

from fedsim import resources
from fedsim.config import RunConfig
from fedsim.data.config import DataConfig
from fedsim.data.ingest import build_store, open_or_build
from fedsim.data.likeness import Diversity, diversity_of, order_by_likeness, token_features
from fedsim.data.regroup import rows_dealt_out
from fedsim.data.store import SPLITS, UserStore
from fedsim.errors import InvalidInput

TOPICS = ("river boat water bank", "engine wheel brake road", "violin chord tempo choir", "flour oven butter sugar")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 users with 1 to 12 texts each, most of a user's on a topic of their own."""
    draw = np.random.default_rng(5)
    rows = []
    for user in range(60):
        for number in range(1 + user % 12):
            topic = TOPICS[user % 4 if draw.random() < 0.7 else draw.integers(4)].split()
            rows.append({"user_id": f"u{user}", "text": " ".join([*draw.permutation(topic), str(user), str(number)])})
    path = tmp_path_factory.mktemp("corpus") / "data.jsonl"
    write_jsonl(path, rows)
    return path


def config_of(path: Path, **options: Any) -> DataConfig:
    return DataConfig(source="files", path=str(path), validation_fraction=0.2, test_fraction=0.2, **options)


def rows_in(view: UserStore) -> list[tuple[int, ...]]:
    rows = view.take(np.arange(view.num_rows))
    return [tuple(rows.tokens[start:stop].tolist()) for start, stop in itertools.pairwise(rows.offsets)]


@pytest.mark.parametrize("kind", ["mixed", "alike"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_rows_stay_in_their_split_and_users_keep_their_sizes(
    corpus: Path, tokenizer: Any, tmp_path: Path, kind: Any, share: float
) -> None:
    real = open_or_build(config_of(corpus), tokenizer, tmp_path)
    made = open_or_build(config_of(corpus, regroup=kind, regroup_share=share), tokenizer, tmp_path)
    assert made.fingerprint != real.fingerprint
    assert made.user_ids() == real.user_ids()
    stayed = []
    for name in SPLITS:
        here, there = real.split(name), made.split(name)
        assert there.user_offsets.tolist() == here.user_offsets.tolist()
        assert sorted(rows_in(there)) == sorted(rows_in(here))
        stayed += [one == other for one, other in zip(rows_in(here), rows_in(there), strict=True)]
        assert there.manifest["users_by_rows"][name] == here.manifest["users_by_rows"][name]
    assert np.mean(stayed) == pytest.approx(1 - share, abs=0.12)
    again = open_or_build(config_of(corpus, regroup=kind, regroup_share=share), tokenizer, tmp_path)
    assert again.fingerprint == made.fingerprint
    assert again.path == made.path
    UserStore.open(made.path, verify=True)


def test_users_are_least_diverse_where_rows_are_alike_and_most_where_they_are_mixed(
    corpus: Path, tokenizer: Any, tmp_path: Path
) -> None:
    shares = [
        diversity_of(open_or_build(config_of(corpus, **options), tokenizer, tmp_path).split("train")).share
        for options in ({"regroup": "alike"}, {}, {"regroup": "mixed", "regroup_share": 0.5}, {"regroup": "mixed"})
    ]
    assert shares == sorted(shares)
    assert shares[0] < shares[1] - 0.1
    assert shares[3] == pytest.approx(1, abs=0.1)
    assert shares[1] < 0.8


def test_the_draws_follow_the_splits_seed(corpus: Path, tokenizer: Any, tmp_path: Path) -> None:
    view = open_or_build(config_of(corpus), tokenizer, tmp_path).split("train")
    first, other = (rows_dealt_out(view, "train", "mixed", 1.0, seed) for seed in (0, 1))
    assert sorted(first) == sorted(other) == list(range(view.num_rows))
    assert first.tolist() != other.tolist()
    assert first.tolist() == rows_dealt_out(view, "train", "mixed", 1.0, 0).tolist()
    assert first.tolist() != rows_dealt_out(view, "test", "mixed", 1.0, 0).tolist()


def test_neighbours_in_the_order_are_alike() -> None:
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(8, 16))
    features = (centres[draw.integers(8, size=400)] + 0.1 * draw.normal(size=(400, 16))).astype(np.float32)
    order = order_by_likeness(features)
    assert sorted(order) == list(range(400))
    steps = np.linalg.norm(np.diff(features[order], axis=0), axis=1)
    assert np.median(steps) < 0.25 * np.median(np.linalg.norm(np.diff(features, axis=0), axis=1))
    assert order_by_likeness(np.ones((9, 4), np.float32)).tolist() == list(range(9))
    assert not len(order_by_likeness(np.zeros((0, 4), np.float32)))


def test_diversity_is_the_ratio_of_mean_squared_distances(corpus: Path, tokenizer: Any, tmp_path: Path) -> None:
    view = open_or_build(config_of(corpus), tokenizer, tmp_path).split("train")
    features, counts = token_features(view).astype(np.float64), np.diff(view.user_offsets)
    assert np.allclose((features**2).sum(axis=1), 1, atol=1e-5)
    owners = np.repeat(np.arange(len(counts)), counts)
    within = []
    between = []
    for user in np.flatnonzero(counts > 1):
        own = features[owners == user]
        within.append(np.mean([((a - b) ** 2).sum() for a, b in itertools.combinations(own, 2)]))
    kept = np.flatnonzero(counts[owners] > 1)
    for one, other in itertools.combinations(kept, 2):
        if owners[one] != owners[other]:
            between.append(((features[one] - features[other]) ** 2).sum())
    found = diversity_of(view)
    assert found.within == pytest.approx(np.mean(within), rel=1e-6)
    assert found.between == pytest.approx(np.mean(between), rel=1e-6)
    assert Diversity(0.0, 2.0).share == 0
    assert np.isnan(Diversity(float("nan"), 0.0).share)


def test_prepared_stores_of_made_up_users_are_whole_or_not_there(corpus: Path, tokenizer: Any, tmp_path: Path) -> None:
    config = config_of(corpus, regroup="mixed")
    output = tmp_path / "made"
    (tmp_path / "made.regrouped").mkdir()
    (tmp_path / "made.regrouped" / "leftover").touch()
    store = build_store(config, tokenizer, output, tmp_path / "cache")
    assert not (output / "leftover").exists()
    assert build_store(config, tokenizer, output, tmp_path / "cache").fingerprint == store.fingerprint
    with pytest.raises(InvalidInput, match="output"):
        build_store(dataclasses.replace(config, regroup="alike"), tokenizer, output, tmp_path / "cache")
    assert store.manifest["recipe"]["data"]["regroup"] == "mixed"


def test_labels_masks_and_classes_move_with_their_rows(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"user_id": f"u{n % 5}", "text": f"answer {n} is long", "prompt": f"question {n}", "label": f"c{n % 3}"}
        for n in range(40)
    ]
    write_jsonl(tmp_path / "data.jsonl", rows)
    for options in ({"prompt_column": "prompt"}, {"label_column": "label"}):
        plain = DataConfig(
            source="files", path=str(tmp_path / "data.jsonl"), validation_fraction=0, test_fraction=0, **options
        )
        real = open_or_build(plain, tokenizer, tmp_path)
        made = open_or_build(dataclasses.replace(plain, regroup="mixed"), tokenizer, tmp_path)
        whole = []
        for store in (real, made):
            taken = store.take(np.arange(store.num_rows))
            labels = taken.tokens if taken.labels is None else taken.labels
            classes = np.zeros(store.num_rows) if taken.classes is None else taken.classes
            ends = list(itertools.pairwise(taken.offsets))
            whole.append(
                sorted(
                    (tuple(taken.tokens[a:b]), tuple(labels[a:b]), int(c))
                    for (a, b), c in zip(ends, classes, strict=True)
                )
            )
        assert whole[0] == whole[1]


def test_what_would_not_be_true_or_do_nothing_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"data\.regroup-share"):
        DataConfig(regroup_share=0.5)
    with pytest.raises(InvalidInput, match=r"data\.regroup-share"):
        DataConfig(regroup="mixed", regroup_share=0.0)
    with pytest.raises(InvalidInput, match=r"data\.regroup"):
        DataConfig(regroup="shuffled")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"data\.regroup"):
        DataConfig(source="files", path="x", owners_column="o", several_owners="keep", regroup="mixed")
    with pytest.raises(InvalidInput, match="none with --release"):
        RunConfig(data=DataConfig(regroup="alike"), release=True)


def test_a_prepared_store_of_made_up_users_is_refused_for_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_look_at", lambda *given: None)
    monkeypatch.setattr(resources, "load_model", lambda *given, **named: None)
    for made_up in (False, True):
        monkeypatch.setattr(resources, "open_data", lambda *given, found=made_up: SimpleNamespace(made_up_users=found))
        config = RunConfig(data=DataConfig(source="store", path="somewhere"), release=True)
        if not made_up:
            resources.open_resources(config)
            continue
        with pytest.raises(InvalidInput, match="a store of real users with --release"):
            resources.open_resources(config)
