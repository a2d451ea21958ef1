"""`evaluate`: a model's loss on users' text, by user, with its uncertainty, and whose text that was."""

import csv
import json
import math
import stat
from pathlib import Path

import numpy as np
import pytest
from trained_models import data_flags, posts, story_llama, train

from experiments.run import main
from fedsim.models.evaluate import EvaluationByUnit


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return train(folder / "x", *data_flags(posts(folder / "posts.jsonl")))


def evaluated(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    assert main(["evaluate", *arguments, "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_test_users_are_measured_as_training_measured_them(run: Path, capsys) -> None:
    found = evaluated(capsys, str(run), "--max-rows", "20")
    summary = json.loads((run / "summary.json").read_text())
    assert found["loss"] == pytest.approx(summary["test_loss_after"], rel=1e-5)
    assert found["accuracy"] == pytest.approx(summary["test_accuracy_after"])
    assert found["users"] == summary["test_users"]
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    low, high = found["perplexity_interval"]
    assert low < found["perplexity"] < high
    assert "training held them out" in found["in_words"][0]
    assert "Not private" in found["in_words"][1]


def test_each_user_is_written_for_the_owner_alone(run: Path, capsys, tmp_path: Path) -> None:
    file = tmp_path / "users.csv"
    found = evaluated(capsys, str(run / "model"), *data_flags(run.parent / "posts.jsonl"), "--data.sequence-length",
                      "16", "--split", "all", "--users-file", str(file))  # fmt: skip
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with file.open(encoding="utf-8") as lines:
        users = list(csv.DictReader(lines))
    assert {user["user"] for user in users} == {f"user {number}" for number in range(60)}
    losses = np.array([float(user["loss"]) for user in users])
    labels = np.array([int(user["labels"]) for user in users])
    assert found["user_loss_mean"] == pytest.approx(losses.mean())
    assert found["loss"] == pytest.approx((losses * labels).sum() / labels.sum())
    assert "trained on most of these users" in found["in_words"][0]
    assert main(["evaluate", str(run), "--users-file", str(file)]) == 2  # nothing is overwritten
    assert "users-file" in capsys.readouterr().err


def test_it_says_when_users_were_training_users_and_when_that_is_not_known(run: Path, capsys) -> None:
    assert "was trained on these users" in evaluated(capsys, str(run), "--split", "train")["in_words"][0]
    data = [*data_flags(run.parent / "posts.jsonl"), "--data.sequence-length", "12"]
    assert "other data options" in evaluated(capsys, str(run), *data)["in_words"][0]
    assert "is not known" in evaluated(capsys, story_llama(), *data)["in_words"][0]


def test_people_get_a_table(run: Path, capsys) -> None:
    assert main(["evaluate", str(run)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("perplexity", "standard error over users", "Not private"))


def test_the_standard_error_of_accuracy_is_over_users() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(1, 30, 400)
    shares = generator.beta(2, 3, 400)

    def of(chosen: np.ndarray) -> EvaluationByUnit:
        return EvaluationByUnit(
            loss_sum=1.0 * chosen, label_count=labels[chosen], correct=(shares * labels)[chosen], rows=labels[chosen]
        )

    drawn = [of(generator.integers(0, 400, 400)).total.accuracy for _ in range(2000)]
    assert of(np.arange(400)).accuracy_standard_error == pytest.approx(np.std(drawn), rel=0.1)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_split_without_users_is_a_sentence(run: Path, split: str, capsys) -> None:
    data = [*data_flags(run.parent / "posts.jsonl"), "--data.sequence-length", "16"]
    none = ["--data.test-fraction", "0", "--data.validation-fraction", "0"]
    assert main(["evaluate", str(run), *data, *none, "--split", split]) == 2
    assert f"There are no {split} users" in capsys.readouterr().err
