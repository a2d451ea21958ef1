"""Classes have names: the data's, or those that somebody gives; in the exported model, and never by guessing."""

import contextlib
import json
from pathlib import Path

import pytest
from trained_models import TINY, data_flags, posts, train

from experiments.run import main
from fedsim.statement import CLASSES_FROM_DATA

CLASSIFY = ["--data.label-column", "mood", "--model.task", "sequence-classification"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*data_flags(posts(tmp_path_factory.mktemp("posts") / "posts.jsonl")), *CLASSIFY]


def exported(run: Path) -> dict:
    return json.loads((run / "model/config.json").read_text())


def test_the_labels_of_the_data_are_names_in_the_export(labelled: list[str], tmp_path: Path, capsys) -> None:
    run = train(tmp_path / "x", *labelled, "--model.num-labels", "3")
    assert exported(run)["id2label"] == {"0": "angry", "1": "calm", "2": "glad"}
    assert exported(run)["label2id"] == {"angry": 0, "calm": 1, "glad": 2}
    assert CLASSES_FROM_DATA in json.loads((run / "privacy.json").read_text())["not_covered"]
    assert "- Classes: angry, calm, glad." in (run / "model/README.md").read_text()
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= found["accuracy"] <= 1
    # Who goes on with them keeps their order.
    order = ["--data.label-names", "glad", "calm", "angry"]
    again = ["train", "--output", str(tmp_path / "y"), *labelled, "--data.sequence-length", "16"]
    assert main([*again, *order, "--model.path", str(run), "--model.num-labels", "3", "--plan.epsilon", "20"]) == 2
    assert "--data.label-names angry calm glad" in capsys.readouterr().err


def test_given_names_are_in_their_order_and_public(labelled: list[str], tmp_path: Path) -> None:
    names = ["--data.label-names", "sad", "glad", "calm", "angry"]
    run = train(tmp_path / "x", *labelled, *names, "--model.num-labels", "4")
    assert list(exported(run)["id2label"].values()) == names[1:]
    assert CLASSES_FROM_DATA not in json.loads((run / "privacy.json").read_text())["not_covered"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "model.num-labels is 2; it must be 3, the labels in the data: angry, calm, glad"),
        (["--data.label-names", "glad", "calm"], "The data also has angry"),
        (["--data.label-names", "glad", "glad"], "each once"),
    ],
)
def test_other_classes_are_a_sentence(
    labelled: list[str], tmp_path: Path, flags: list[str], words: str, capsys
) -> None:
    with contextlib.suppress(SystemExit):  # of what the options alone show
        assert main(["train", "--output", str(tmp_path / "x"), *TINY, *labelled, *flags]) == 2
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert words in printed
    assert not (tmp_path / "x/ledger.jsonl").exists()


def test_classification_without_labels_is_a_sentence(labelled: list[str], tmp_path: Path, capsys) -> None:
    bare = [flag for flag in labelled if flag not in ("--data.label-column", "mood")]
    assert main(["train", "--output", str(tmp_path / "x"), *TINY, *bare]) == 2
    assert "data.label-column" in capsys.readouterr().err
