"""A real run that averages its released weights: exported, measured, stated, resumed, alarmed, attacked as such."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import ROUNDS, trained

from experiments.audit.black_box import _train
from experiments.report.run import write_report
from fedsim.config import EvaluationConfig, OptimizerConfig
from fedsim.gradients import ParameterLayout
from fedsim.optimizer import ServerOptimizer
from fedsim.plan import UserSizes
from fedsim.privacy.ledger import read_entries
from fedsim.resources import open_resources
from server.checkpoint import read_latest
from server.round import Diverged, Gather, Round

EXPONENTIAL = OptimizerConfig(average="exponential", average_decay=0.8)
TAIL = OptimizerConfig(average="tail", average_share=0.4)


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The weights after each step, float64 [P]."""
    seen: list[np.ndarray] = []
    step = ServerOptimizer.step

    def noted(self: ServerOptimizer, mean: np.ndarray) -> None:
        step(self, mean)
        seen.append(self.parameters.astype(np.float64))

    monkeypatch.setattr(ServerOptimizer, "step", noted)
    return seen


def averaged(config: OptimizerConfig, weights: list[np.ndarray]) -> np.ndarray:
    if config.average == "tail":
        return np.asarray(np.mean(weights[-round(config.average_share * ROUNDS) :], axis=0))
    return np.asarray(np.average(weights, axis=0, weights=config.average_decay ** np.arange(len(weights))[::-1]))


def exported(folder: Path, layout: ParameterLayout) -> np.ndarray:
    """The flat parameters in a run's exported model."""
    tensors = load_file(folder / "model/model.safetensors")
    found = {name: tensors[next(key for key in tensors if name.endswith(key))] for name in layout.names}
    return torch.cat([found[name].flatten() for name in layout.names]).numpy()


@pytest.mark.parametrize("optimizer", [EXPONENTIAL, TAIL], ids=["exponential", "tail"])
def test_what_is_exported_measured_and_stated_is_the_average_at_the_same_epsilon(
    small_run, tmp_path: Path, weights, optimizer: OptimizerConfig
) -> None:
    plain = trained(small_run(tmp_path / "none"))
    plain_weights, weights[:] = list(weights), []
    config = small_run(tmp_path / "run", optimizer=optimizer)
    summary = trained(config)
    assert all(np.array_equal(one, other) for one, other in zip(weights, plain_weights, strict=True))
    layout = ParameterLayout.of(open_resources(config).loaded.model)
    expected = averaged(optimizer, weights)
    assert np.abs(expected - weights[-1]).max() > 1e-4
    np.testing.assert_allclose(exported(tmp_path / "run", layout), expected, atol=1e-6)
    np.testing.assert_allclose(exported(tmp_path / "none", layout), weights[-1], atol=1e-7)

    assert summary["epsilon"] == plain["epsilon"]
    stated, alone = (json.loads((tmp_path / name / "privacy.json").read_text()) for name in ("run", "none"))
    (sentence,) = stated["post_processing"]
    assert sentence in stated["in_words"]
    assert {name for name in stated if stated[name] != alone[name]} == {"in_words", "post_processing"}
    entries, others = (read_entries(tmp_path / name / "ledger.jsonl") for name in ("run", "none"))
    assert [(entry.round, entry.event) for entry in entries] == [(entry.round, entry.event) for entry in others]

    words = {"exponential": "exponential average (decay 0.8)", "tail": "mean of the last 4 rounds"}[optimizer.average]
    assert (plain["weights"], summary["weights"]) == ("last", words)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert (lines[0]["weights"], lines[-1]["weights"]) == ("last", words)
    assert summary["test_loss_before"] == plain["test_loss_before"]
    assert summary["test_loss_after"] != plain["test_loss_after"]
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert f"<td>weights measured and exported</td><td>{words}</td>" in page
    assert sentence.split(":")[0] in page


@pytest.mark.parametrize("crash", [3, 8])
@pytest.mark.parametrize("optimizer", [EXPONENTIAL, TAIL], ids=["exponential", "tail"])
def test_a_crashed_run_goes_on_to_the_same_average_bit_for_bit(
    small_run, tmp_path: Path, monkeypatch, optimizer: OptimizerConfig, crash: int
) -> None:
    whole = trained(small_run(tmp_path / "whole", optimizer=optimizer))
    original = Round.run

    def once(self: Round, number: int, gather: Gather) -> dict[str, float]:
        if number == crash:
            raise RuntimeError("the power is out")
        return original(self, number, gather)

    config = small_run(tmp_path / "run", optimizer=optimizer)
    monkeypatch.setattr(Round, "run", once)
    with pytest.raises(RuntimeError, match="the power is out"):
        trained(config)
    monkeypatch.setattr(Round, "run", original)
    kept = read_latest(tmp_path / "run/checkpoints")
    assert kept is not None
    begun = optimizer.average == "exponential" or kept.round > 6
    assert ("optimizer/average/values" in kept.arrays) == begun
    summary = trained(dataclasses.replace(config, resume=config.output))
    for name in ("weights", "rounds", "test_loss_after", "test_accuracy_after"):
        assert summary[name] == whole[name]
    models = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("run", "whole")]
    assert models[0] == models[1]


def test_the_alarm_of_unchanged_weights_looks_at_those_that_were_trained(
    small_run, tmp_path: Path, monkeypatch
) -> None:
    def aside(self: ServerOptimizer, mean: np.ndarray) -> None:
        """The average moves, the weights do not."""
        self.average.add(torch.from_numpy(self.parameters + mean), ROUNDS - 1)

    monkeypatch.setattr(ServerOptimizer, "step", aside)
    summary = trained(small_run(tmp_path, optimizer=EXPONENTIAL))
    assert "unchanged" in {alarm["alarm"] for alarm in summary["alarms"]}


@pytest.mark.parametrize("optimizer", [EXPONENTIAL, TAIL], ids=["exponential", "tail"])
def test_weights_that_overflow_end_the_run_whatever_their_average(
    small_run, tmp_path: Path, optimizer: OptimizerConfig
) -> None:
    wild = dataclasses.replace(optimizer, name="momentum", learning_rate=3e38)
    measured = EvaluationConfig(every=100, max_rows=20, test_rows=20)  # of which no loss would end it before
    with pytest.raises(Diverged, match=r"a lower --optimizer\.learning-rate"):
        trained(small_run(tmp_path, optimizer=wild, evaluation=measured))
    kept = read_latest(tmp_path / "checkpoints")
    assert kept is None or all(np.isfinite(array).all() for array in kept.arrays.values())


def test_a_tail_that_the_budget_did_not_reach_is_an_alarm_in_summary_and_report(small_run, tmp_path: Path) -> None:
    plan = dataclasses.replace(small_run(tmp_path).plan, epsilon=0.9 * small_epsilon(small_run(tmp_path)))
    summary: dict[str, Any] = trained(small_run(tmp_path, plan=plan, optimizer=OptimizerConfig(
        average="tail", average_share=0.2)))  # fmt: skip
    assert summary["rounds"] < 8
    assert summary["weights"] == "last"
    (sentence,) = [alarm["in_words"] for alarm in summary["alarms"] if alarm["alarm"] == "no-average"]
    assert re.search(r"the average was to begin with round 9", sentence)
    assert "the average was to begin with round 9" in write_report(tmp_path).read_text(encoding="utf-8")
    assert json.loads((tmp_path / "privacy.json").read_text())["post_processing"] == []


def small_epsilon(config: Any) -> float:
    """ε of eight of the run's ten rounds."""
    plan = config.plan.for_users(UserSizes.of_users(open_resources(config).store.split("train")))
    bound: float = plan.epsilon(8).upper
    return bound


def test_a_black_box_audit_attacks_the_average_that_a_run_exports(small_run, tmp_path: Path, weights) -> None:
    config = small_run(tmp_path, optimizer=TAIL)
    resources = open_resources(config)
    plan = config.plan.for_users(UserSizes.of_users(resources.store.split("train")))
    _train(config, plan, resources, np.zeros(2, dtype=np.int64), seed=1)
    model = resources.loaded.model
    attacked = np.asarray(ParameterLayout.of(model).flatten(model))
    np.testing.assert_allclose(attacked, averaged(TAIL, weights), atol=1e-6)
    assert np.abs(attacked - weights[-1]).max() > 1e-4
