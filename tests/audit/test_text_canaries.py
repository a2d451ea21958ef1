"""Canaries in text: coins decide who is in, the final model tells it, and what is claimed is held against that."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import clients.worker
from experiments.audit import command, membership, text_model
from experiments.audit import text_canaries as audited
from experiments.audit.canaries import CanaryUsers
from experiments.audit.text_canaries import TextFinding, TextUsers, text_canaries
from experiments.audit.text_model import TextModel, text_canaries_among_users
from experiments.audit.training import JoinedUsers
from experiments.run import main
from fedsim.config import OptimizerConfig, PlanConfig, RunConfig
from fedsim.plan import UserSizes
from fedsim.privacy.audit.membership import true_positives
from fedsim.privacy.mechanisms import GaussianNoise
from fedsim.rows import TokenRows
from server.results.run_folder import RunFolder

GROUP_SIZE = {"uls": 1, "els": 2}
SLOW_SGD = OptimizerConfig(name="sgd", learning_rate=0.05)
ALGORITHMS = pytest.mark.parametrize("algorithm", ["uls", "els"])


def planned(algorithm: Any, canaries: int, rounds: int, **more: Any) -> PlanConfig:
    """Everybody in each round, at ε = 4."""
    group_size = GROUP_SIZE[algorithm]
    return PlanConfig(
        algorithm=algorithm,
        group_size=group_size,
        gradients_per_round=canaries * group_size,
        rounds=rounds,
        **{"epsilon": 4.0, **more},
    )


def attacked(algorithm: str, *, canaries: int = 400, rounds: int = 2, seed: int = 5, **more: Any) -> TextFinding:
    """Text canaries as the only users, on a small model."""
    config = RunConfig(plan=planned(algorithm, canaries, rounds))
    plan = config.plan.for_users(UserSizes.of_quantiles(canaries, {0.5: GROUP_SIZE[algorithm]}))
    model = TextModel.of_size(vocabulary=1024, width=16)
    return text_canaries(
        config,
        plan,
        model,
        model.vocabulary,
        canaries=canaries,
        optimizer=SLOW_SGD,
        confidence=0.95,
        seed=seed,
        **more,
    )


@pytest.fixture
def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GaussianNoise, "add", lambda self, total, clip, source: None)


@ALGORITHMS
def test_without_noise_the_losses_tell_who_was_in_which_contradicts_the_claim(algorithm: str, without_noise) -> None:
    found = attacked(algorithm)
    assert found.area.area > 0.999
    assert found.found.rate > 0.99
    assert found.finding.contradicts
    assert found.finding.epsilon_lower > found.finding.epsilon_certified
    assert "contradicts the claimed guarantee" in found.in_words()


@ALGORITHMS
def test_noise_as_claimed_is_not_contradicted_and_hides_most(algorithm: str) -> None:
    found = attacked(algorithm, rounds=4)
    assert found.finding.epsilon_certified == pytest.approx(4.0, rel=1e-3)
    assert not found.finding.contradicts
    assert 0.65 < found.area.area < 0.85  # 0.74 is what the noise permits
    assert found.finding.epsilon_lower_free > 0.3


def test_nothing_is_told_where_everybody_was_kept_out(without_noise) -> None:
    found = attacked("uls", control=True)
    assert found.area.lower <= 0.5 <= found.area.upper
    assert found.finding.epsilon_lower < 1


@ALGORITHMS
def test_those_whose_coin_says_so_are_in(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries, each = 40, GROUP_SIZE[algorithm]
    seen: list[np.ndarray] = []
    clipped_sum = clients.worker.clipped_sum

    def noted(model: Any, rows: TokenRows, *arguments: Any, **more: Any) -> Any:
        seen.append(rows.tokens.reshape(len(rows), -1))
        return clipped_sum(model, rows, *arguments, **more)

    monkeypatch.setattr(clients.worker, "clipped_sum", noted)
    scores: dict[str, np.ndarray] = {}
    finding = audited.one_run_finding
    monkeypatch.setattr(
        audited,
        "one_run_finding",
        lambda plan, given, coins, confidence: scores.update(coins=coins) or finding(plan, given, coins, confidence),
    )
    attacked(algorithm, canaries=canaries, rounds=1)
    generator = np.random.default_rng(5)
    coins = generator.random(canaries) < 0.5
    texts = TextUsers.made_up(canaries, np.arange(1024), generator, each=each)
    (computed,) = seen
    expected = texts.take(np.flatnonzero(np.repeat(coins, each))).tokens.reshape(-1, computed.shape[1])
    np.testing.assert_array_equal(computed, expected)
    np.testing.assert_array_equal(scores["coins"], coins)


def test_texts_share_as_few_tokens_as_there_can_be() -> None:
    users = TextUsers.made_up(10, np.arange(7, 27), np.random.default_rng(0), each=3, tokens=4)
    tokens = users.take(np.arange(users.num_rows)).tokens.reshape(10, 3, 4)
    assert (tokens == tokens[:, :1]).all()
    np.testing.assert_array_equal(np.unique(tokens[:, 0], return_counts=True), [np.arange(7, 27), np.full(20, 2)])


@pytest.mark.parametrize("prompts", [False, True])
def test_canaries_leave_the_labels_of_users_as_they_are(prompts: bool) -> None:
    """Those of rows with prompts and those of rows without any."""

    class Labelled(CanaryUsers):
        def take(self, row_indices: np.ndarray, /) -> TokenRows:
            rows = super().take(row_indices)
            return dataclasses.replace(rows, labels=np.full(len(rows.tokens), -100)) if prompts else rows

    texts = TextUsers(np.array([[7, 8], [9, 10]]), each=1)
    joined = JoinedUsers(Labelled(np.array([1]), np.array([5])), texts, np.arange(2)).take(np.array([0, 2]))
    assert joined.tokens.tolist() == [5, 9, 10]
    assert (None if joined.labels is None else joined.labels.tolist()) == ([-100, 9, 10] if prompts else None)


def test_without_noise_nothing_is_claimed_that_could_be_contradicted() -> None:
    plan = planned("uls", 64, 4).for_users(UserSizes.of_quantiles(64, {0.5: 1}))
    coins = np.arange(64) % 2 == 0
    found = audited.one_run_finding(dataclasses.replace(plan, noise_multiplier=0.0), coins * 1.0, coins, 0.95)
    assert found.epsilon_certified == math.inf
    assert found.epsilon_lower == found.epsilon_lower_free > 0
    assert not found.contradicts


@ALGORITHMS
def test_canaries_join_the_users_of_a_run(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of whom take part: the population is theirs and the canaries', those who were held out included."""
    train = TextUsers(np.arange(120).reshape(30, 4), each=3)
    model = TextModel.of_size(vocabulary=512, width=16)
    resources = SimpleNamespace(loaded=model, store=train, row_tokens=6)
    monkeypatch.setattr(text_model, "open_resources", lambda config: resources)
    monkeypatch.setattr(text_model, "vocabulary_of", lambda loaded: np.arange(200, 500))
    given: dict[str, Any] = {}
    train_in_place = audited.train_in_place

    def noted(*arguments: Any, **more: Any) -> None:
        given.update(plan=arguments[1], users=arguments[3], present=more["present"])
        train_in_place(*arguments, **more)

    monkeypatch.setattr(audited, "train_in_place", noted)
    config = RunConfig(plan=planned(algorithm, 30, 2, delta=1e-3), optimizer=SLOW_SGD)
    plan = config.plan.for_users(UserSizes.of_users(train))
    found = text_canaries_among_users(config, plan, canaries=40, confidence=0.9, seed=2)
    own = 30 if algorithm == "uls" else 90
    assert given["present"][:own].tolist() == list(range(own))
    assert len(given["present"]) - own == found.canaries[0] * GROUP_SIZE[algorithm]
    assert given["users"].num_users == 70
    assert given["users"].row_lengths[-1] == 6
    assert found.private_users
    assert "Not private" in found.in_words()
    assert found.to_json()["private"] is False


def test_the_command_attacks_canaries_alone_and_says_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found.json"
    plan = ["--plan.gradients-per-round", "64", "--plan.rounds", "2"]
    assert main(["audit", "--text-canaries", "64", *plan, "--seed", "1", "--output", str(output)]) == 0
    found = json.loads(output.read_text(encoding="utf-8"))
    assert sum(found["canaries"]) == found["finding"]["trials"] == 64
    assert found["finding"]["epsilon_certified"] == pytest.approx(4.0, rel=1e-3)
    assert found["area"]["lower"] < found["area"]["area"] < found["area"]["upper"]
    printed = capsys.readouterr().out
    assert found["in_words"] in printed
    assert "passed" in printed


def test_the_command_ends_with_one_where_noise_is_left_out(without_noise, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["--plan.gradients-per-round", "400", "--plan.rounds", "1"]
    assert main(["audit", "--text-canaries", "400", *plan, "--seed", "1"]) == 1
    assert "BROKEN" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--text-canaries", "8"], "text-canaries"), (["--text-canaries", "64", "--model.lora-rank", "2"], "model.path")],
)
def test_what_cannot_be_attacked_is_refused(options: list[str], named: str, capsys) -> None:
    assert main(["audit", *options, "--plan.gradients-per-round", "64"]) == 2
    assert named in capsys.readouterr().err


def test_training_that_diverged_tells_nothing() -> None:
    plan = planned("uls", 64, 4).for_users(UserSizes.of_quantiles(64, {0.5: 1}))
    with pytest.raises(audited.InvalidInput, match="learning-rate"):
        audited.one_run_finding(plan, np.full(64, np.nan), np.arange(64) % 2 == 0, 0.95)


@pytest.mark.parametrize("outside", [100, 1000])
def test_true_positives_lie_in_their_interval_as_often_as_it_says(outside: int) -> None:
    generator = np.random.default_rng(1)
    expected = 0.5 * math.erfc((1.6448536 - 1.5) / math.sqrt(2))  # of a shift of 1.5 at 5 % false positives
    held = []
    for _ in range(300):
        found = true_positives(
            generator.normal(1.5, size=200), generator.normal(size=outside), false_positive=0.05, confidence=0.8
        )
        held.append(found.lower <= expected <= found.upper)
        assert found.lower <= found.rate <= found.upper
    assert np.mean(held) > 0.78
    assert true_positives(np.arange(10) + 100.0, np.arange(1000.0), false_positive=0.01).rate == 0.0
    few = true_positives(np.arange(10) + 1000.0, np.arange(50.0))
    assert (few.rate, few.lower, few.upper) == (1.0, 0.0, 1.0)


def test_what_canaries_among_a_runs_users_show_stands_in_the_file_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(words: str) -> SimpleNamespace:
        return SimpleNamespace(in_words=lambda: words, to_json=lambda: {"in_words": words}, finding=words)

    monkeypatch.setattr(command, "_config_of", lambda folder: RunConfig())
    monkeypatch.setattr(membership, "infer_users", lambda *_, **__: said("users"))
    monkeypatch.setattr(text_model, "text_canaries_among_users", lambda *_, canaries, **__: said(f"texts {canaries}"))
    plan = planned("uls", 64, 4).for_users(UserSizes.of_quantiles(64, {0.5: 1}))
    path = tmp_path / "apart.json"
    folder = RunFolder(tmp_path)
    assert command.Audit(text_canaries=40)._attack_model(folder, plan, path, 1) == ["texts 40"]
    assert [one["in_words"] for one in json.loads(path.read_text())["black_box"]] == ["users", "texts 40"]
    assert "Training again, with text canaries (not private" in capsys.readouterr().out
    assert command.Audit()._attack_model(folder, plan, path, 1) == []
    without = dataclasses.replace(plan, noise_multiplier=0.0)
    assert command.Audit(text_canaries=40)._attack_model(folder, without, path, 1) == []
