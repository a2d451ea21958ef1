"""The audit from the command line: of a plan, and of a finished run with its model."""

import html
import json
import shutil
from pathlib import Path

import pytest
from small_flags import LOCAL, SMALL

from experiments.audit.command import Audit
from experiments.run import main
from fedsim.errors import InvalidInput
from server.results.run_folder import RunFolder

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
    assert [finding["contradicts"] for finding in found["white_box"]] == [False] * 4
    assert {promise["kept"] for promise in found["promises"]} == {True}
    assert found["white_box"][0]["epsilon_lower"] > 0.3 * found["white_box"][0]["epsilon_certified"]
    assert "passed" in capsys.readouterr().out


ATTACKS = ["--trials", "40", "--canaries", "64", "--seed", "4"]
MARK = "not private: computed from training users without noise"


def texts_of(folder: Path) -> dict[str, str]:
    """What is written in a folder, models and figures apart."""
    kinds = {".json", ".jsonl", ".html", ".md"}
    paths = [path for path in folder.rglob("*") if path.suffix in kinds and path.parent == folder]
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def test_a_run_carries_what_canaries_found_and_what_its_users_showed_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(["train", *RUN, "--plan.mechanism", "adaptive-noise", "--output", str(folder)]) == 0
    assert "audit" not in json.loads((folder / "privacy.json").read_text(encoding="utf-8"))
    capsys.readouterr()
    assert main(["audit", "--run-folder", str(folder), *ATTACKS, "--repetitions", "20"]) == 0
    audit = json.loads((folder / "privacy.json").read_text(encoding="utf-8"))["audit"]
    assert len(audit["white_box"]) == 4
    assert "black_box" not in audit
    users = json.loads((folder / "audit_not_private.json").read_text(encoding="utf-8"))
    assert users["private"] is False
    assert [(finding["kind"], finding["private"]) for finding in users["black_box"]] == [("evidence", False)] * 2
    inference, repeated = (finding["in_words"] for finding in users["black_box"])
    assert MARK in inference
    assert "not private: it trained again" in repeated
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "no proof" in page
    guaranteed, _, apart = page.partition("<h2>Not private</h2>")
    assert "User inference" not in guaranteed
    assert "audit_not_private.json" in apart
    assert inference in html.unescape(apart)
    printed = capsys.readouterr().out
    assert inference in printed
    assert "each canary 20 times (not private: it trains on the private users once more, which no ledger" in printed
    assert "User inference" not in "".join(
        text for name, text in texts_of(folder).items() if name not in ("audit_not_private.json", "report.html")
    )


def test_nothing_of_its_users_is_written_into_a_folder_to_be_released(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    seeds = RUN.index("--sampling-seed")
    unseeded = RUN[:seeds] + RUN[seeds + 4 :]
    assert main(["train", *unseeded, "--release", "--output", str(folder)]) == 0
    inside = ["--not-private-output", str(folder / "model" / "found.json")]
    assert main(["audit", "--run-folder", str(folder), *ATTACKS, *inside]) == 2
    assert "not-private-output" in capsys.readouterr().err
    assert main(["audit", "--run-folder", str(folder), *ATTACKS]) == 0
    printed = capsys.readouterr().out
    assert "audit" in json.loads((folder / "privacy.json").read_text(encoding="utf-8"))
    for name, text in texts_of(folder).items():
        for word in ("black_box", "User inference", "AUC 0", "<h2>Not private</h2>"):
            assert word not in text, name
    beside = json.loads((tmp_path / "run_audit_not_private.json").read_text(encoding="utf-8"))
    assert beside["private"] is False
    assert MARK in beside["black_box"][0]["in_words"]
    assert f"{tmp_path / 'run_audit_not_private.json'}: not private" in printed


@pytest.mark.parametrize("metrics", ["off", "on"])
def test_findings_on_users_of_an_arm_stay_out_of_its_comparison_too(tmp_path: Path, metrics: str) -> None:
    written = Path(__file__).parent / "runs_of_version_0_1" / "compare"
    arm = Path(shutil.copytree(written, tmp_path / "both")) / "uls"
    (tmp_path / "both" / "comparison.json").touch()
    config = json.loads((arm / "config.json").read_text(encoding="utf-8"))
    config["config"]["training-metrics"] = metrics
    (arm / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = Audit(run_folder=str(arm))._users_file(RunFolder(arm))
    inside = Audit(run_folder=str(arm), not_private_output=str(tmp_path / "both" / "found.json"))
    if metrics == "on":
        assert found == arm / "audit_not_private.json"
        assert inside._users_file(RunFolder(arm)) == tmp_path / "both" / "found.json"
    else:
        assert found == tmp_path / "both_uls_audit_not_private.json"
        with pytest.raises(InvalidInput, match="a file outside of"):
            inside._users_file(RunFolder(arm))


def test_what_an_earlier_version_wrote_into_the_statement_is_shown_as_not_private(tmp_path: Path) -> None:
    written = Path(__file__).parent / "runs_of_version_0_1" / "uls-quantile"
    folder = Path(shutil.copytree(written, tmp_path / "run"))
    statement = json.loads((folder / "privacy.json").read_text(encoding="utf-8"))
    found = {"white_box": [], "black_box": [{"in_words": "User inference by loss: AUC 0.9"}]}
    (folder / "privacy.json").write_text(json.dumps(statement | {"audit": found}), encoding="utf-8")
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    guaranteed, _, apart = page.partition("<h2>Not private</h2>")
    assert "AUC 0.9" not in guaranteed
    assert "audit (privacy.json): User inference by loss: AUC 0.9" in apart


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--run-folder", str(tmp_path)]) == 2
    assert "run-folder" in capsys.readouterr().err


def test_noise_is_searched_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "noise.json"
    arguments = ["--epsilon", "0.5", "--delta", "1e-2", "--generations", "0", "--output", str(output)]
    assert main(["search-noise", *arguments]) == 0
    assert "checked again" in capsys.readouterr().out
    assert json.loads(output.read_text(encoding="utf-8"))["format"] == "fedsim-laplace-noise"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.path", "x"], "used with --text-canaries"),
        (["--optimizer.learning-rate", "2"], "used with --text-canaries"),
        (["--users", "40"], "used with --run-folder"),
        (["--repetitions", "1"], "used with --run-folder"),
        (["--text-canaries", "100", "--trials", "64"], "left out where --text-canaries are all that there is"),
        (["--run-folder", "x", "--num-users", "9"], "left out with --run-folder"),
        (["--run-folder", "x", "--plan.epsilon", "9"], "left out with --run-folder"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())
