"""Clip norms that would do what another did are left out of a sweep, and that is said."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from mock_sweep import FakeTraining, small_sweep

import server.app
from experiments.sweep.points import SweepConfig
from fedsim.config import OptimizerConfig, RunConfig

ASKED = SweepConfig(algorithms=("uls",), clip_norms=(0.3, 30.0, 3.0), seeds=2, nonprivate=False)


@pytest.fixture
def clipping(training: FakeTraining, monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    """Training of which 3 clips everything, and 30 all but one unit of one round."""

    def trained(grid: Any, config: RunConfig, **_: Any) -> dict[str, Any]:
        summary = training(grid, config)
        path = Path(str(config.output)) / "metrics.jsonl"
        last = json.loads(path.read_text())
        shares = [1.0, 0.99 if config.plan.clip_norm > 3 else 1.0]
        lines = [
            last
            | {"round": number, "not_private": {"clipped_fraction": share} if config.writes_training_metrics else {}}
            for number, share in enumerate(shares, 1)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return summary

    monkeypatch.setattr(server.app, "train", trained)
    return training


def norms(training: FakeTraining) -> list[str]:
    return [name.split("-")[4] for name in training.trained]


def test_smaller_clip_norms_are_left_out_where_all_was_clipped(
    clipping: FakeTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # the same when it goes on
        assert small_sweep(tmp_path, sweep=ASKED).run() == 0
        assert norms(clipping) == ["C30", "C30", "C3", "C3"]
        words = " ".join(capsys.readouterr().out.split())
        assert "under Adam a clip norm at which everything is clipped does as any smaller one" in words
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name.split("-")[4] for name in results["left_out"]["points"]} == {"C0.3"}
    assert len(results["left_out"]["points"]) == 2
    assert results["privacy_cost"]["epsilon"] is None, "how many models there are was decided without noise"
    assert "under Adam" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "changes", [{"optimizer": OptimizerConfig(name="sgd")}, {"training_metrics": "off"}], ids=["sgd", "not-seen"]
)
def test_all_are_run_where_they_differ_or_nobody_may_look(
    changes: dict[str, Any], clipping: FakeTraining, tmp_path: Path
) -> None:
    assert small_sweep(tmp_path, sweep=ASKED, **changes).run() == 0
    assert sorted(norms(clipping)) == sorted(["C0.3", "C30", "C3"] * 2)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["left_out"]["points"] == []
    assert results["privacy_cost"]["epsilon"] > 0


def test_what_is_left_out_is_said_where_only_the_best_is_repeated(clipping: FakeTraining, tmp_path: Path) -> None:
    assert small_sweep(tmp_path, sweep=dataclasses.replace(ASKED, repeat="best")).run() == 0
    assert norms(clipping)[:2] == ["C30", "C3"]
    assert "C0.3" not in norms(clipping)
    (left_out,) = json.loads((tmp_path / "results.json").read_text())["left_out"]["points"]
    assert "-C0.3-" in left_out
