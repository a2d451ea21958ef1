"""The audit from the command line: of a plan, and of a finished run with its model."""

import json
from pathlib import Path

import pytest
from small_flags import LOCAL, SMALL

from experiments.run import main

RUN = [
    *SMALL, *LOCAL,
    "--plan.gradients-per-round", "32",
    "--plan.rounds", "3",
    "--optimizer.learning-rate", "5e-3",
    "--evaluation.max-rows", "50",
    "--evaluation.test-rows", "100",
]  # fmt: skip


def test_a_plan_is_audited_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "audit.json"
    arguments = ["--trials", "120", "--canaries", "64", "--num-users", "300", "--plan.gradients-per-round", "60"]
    arguments += ["--plan.rounds", "4", "--plan.delta", "1e-4", "--seed", "4", "--output", str(output)]
    assert main(["audit", *arguments]) == 0
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["kind"] == "evidence"
    assert [finding["contradicts"] for finding in found["white_box"]] == [False] * 3
    assert [promise["kept"] for promise in found["promises"]] == [True] * 5
    assert found["white_box"][0]["epsilon_lower"] > 0.3 * found["white_box"][0]["epsilon_certified"]
    assert "passed" in capsys.readouterr().out


def test_a_run_carries_its_audit(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main(["train", *RUN, "--plan.mechanism", "adaptive-noise", "--output", str(folder)]) == 0
    assert "audit" not in json.loads((folder / "privacy.json").read_text(encoding="utf-8"))
    arguments = ["--trials", "40", "--canaries", "64", "--repetitions", "20", "--seed", "4"]
    assert main(["audit", "--run-folder", str(folder), *arguments]) == 0
    audit = json.loads((folder / "privacy.json").read_text(encoding="utf-8"))["audit"]
    assert len(audit["white_box"]) == 3
    assert [finding["kind"] for finding in audit["black_box"]] == ["evidence", "evidence"]
    assert "no proof" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--run-folder", str(tmp_path)]) == 2
    assert "run-folder" in capsys.readouterr().err


def test_noise_is_searched_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "noise.json"
    arguments = ["--epsilon", "0.5", "--delta", "1e-2", "--generations", "0", "--output", str(output)]
    assert main(["search-noise", *arguments]) == 0
    assert "checked again" in capsys.readouterr().out
    assert json.loads(output.read_text(encoding="utf-8"))["format"] == "fedsim-laplace-noise"
