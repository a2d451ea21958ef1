"""A run on examples of several owners, end to end: what it says, what is refused, and that its ε is confirmed."""

import json
from typing import Any

import pytest

from experiments.run import main
from fedsim import InvalidInput, fine_tune

GRAPH = {"several_owners": "keep", "owners_column": "owners", "algorithm": "els", "adjacency": "fixed-graph"}
Rows = list[dict[str, Any]]


@pytest.fixture
def shared(rows: Rows) -> Rows:
    """Every third note is its user's and the next user's."""
    return [
        row | {"owners": [row["user_id"], *([f"user {(i + 1) % 40}"] if i % 3 == 0 else [])]}
        for i, row in enumerate(rows)
    ]


def test_a_run_says_what_it_does_not_claim(
    shared: Rows, model: Any, tokenizer: Any, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = fine_tune(model, shared, tokenizer=tokenizer, group_size=4, **GRAPH, **options)
    said = tuned.statement
    assert said["adjacency"] == "fixed-graph"
    assert "emptying all examples that one user owns, alone or with others" in said["in_words"]
    assert "adding or removing one user with all" not in said["in_words"]
    assert "at most 4 of the examples that a user owns" in said["contribution_bound"]["in_words"]
    assert any(sentence.startswith("It is NOT claimed that adding or removing") for sentence in said["not_covered"])
    assert any("graph of users and examples is treated as public" in sentence for sentence in said["not_covered"])
    (count,) = said["public_sizes"].values()
    assert said["sampling"]["probability"] == pytest.approx(32 / count)
    cards = [path.read_text() for path in tuned.folder.rglob("README.md")]
    assert cards
    for card in cards:
        assert "| Neighbouring data | fixed-graph |" in card
        assert "It is NOT claimed that adding or removing one user is hidden" in card
    capsys.readouterr()
    assert main(["account", "--check", str(tuned.folder)]) == 0
    assert "confirmed in" in capsys.readouterr().out
    recompute = said["recompute"].split()[3:]
    assert main(recompute) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"]["upper"] == pytest.approx(said["epsilon"]["upper"], rel=1e-3)


def test_the_same_charge_as_without_co_owners(rows: Rows, model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    """Where everybody owns their notes alone the graph changes nothing but the claim."""
    alone = [row | {"owners": [row["user_id"]]} for row in rows]
    kept = fine_tune(model, alone, tokenizer=tokenizer, group_size=4, **GRAPH, **options)
    plain = fine_tune(model, rows, tokenizer=tokenizer, group_size=4, algorithm="els", **options)
    for name in ("public_sizes", "event", "epsilon"):
        assert list(map(str, _values(kept.statement[name]))) == list(map(str, _values(plain.statement[name])))


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else [value]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithm": "uls"}, "plan.algorithm|algorithm"),
        ({"adjacency": "add-or-remove-one-user"}, "adjacency.*fixed-graph"),
        ({"several_owners": "drop"}, "adjacency.*several"),
        ({"sampling": "cyclic-poisson"}, "sampling.*poisson where examples have several owners"),
        ({"sampling": "random-allocation"}, "sampling"),
        ({"bands": "4"}, "bands|sampling"),
        ({"selection": "longest"}, "selection.*random or first"),
        ({"owners_column": None}, "several.owners"),
        ({"minimum_rows": 2}, "minimum.rows"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_has_no_such_form_is_refused_before_anything_is_spent(
    shared: Rows, model: Any, tokenizer: Any, options: dict[str, Any], changes: dict[str, Any], words: str, places: Any
) -> None:
    with pytest.raises(InvalidInput, match=words):
        fine_tune(model, shared, tokenizer=tokenizer, **(GRAPH | changes), **options)
    assert not list(places.rglob("ledger.jsonl"))


def test_a_prepared_store_is_trained_on_under_its_own_adjacency_alone(
    shared: Rows, model: Any, tokenizer: Any, options: dict[str, Any], tmp_path: Any
) -> None:
    from fedsim.data.config import DataConfig
    from fedsim.data.ingest import build_store

    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in shared))
    data = DataConfig(source="files", path=str(path), owners_column="owners", several_owners="keep")
    store = str(build_store(data, tokenizer, tmp_path / "store").path)
    common = {"tokenizer": tokenizer, "algorithm": "els", **options}
    with pytest.raises(InvalidInput, match=r"adjacency.*fixed-graph.*several owners"):
        fine_tune(model, store, **common)
    assert fine_tune(model, store, adjacency="fixed-graph", **common).statement["private"]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "owners"}) + "\n" for row in shared))
    plain = DataConfig(source="files", path=str(path))
    store = str(build_store(plain, tokenizer, tmp_path / "plain").path)
    with pytest.raises(InvalidInput, match=r"adjacency.*add-or-remove-one-user where every example has one owner"):
        fine_tune(model, store, adjacency="fixed-graph", **common)
