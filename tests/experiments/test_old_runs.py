"""What version 0.1 wrote still opens: reports, statements, ledgers, plans. Only going on is refused."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from experiments.audit.command import _plan_of
from experiments.run import main
from fedsim.config import RunConfig
from fedsim.privacy.ledger import Ledger, merged
from fedsim.privacy.mechanisms import MatrixNoise, RandomisedLaplace
from server.identity import stored_config
from server.results.run_folder import RunFolder

WRITTEN = Path(__file__).parent / "runs_of_version_0_1"
RUNS = ["uls-quantile", "els-matrix", "uls-laplace", "compare/uls", "compare/els"]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(WRITTEN, tmp_path / "runs"))


@pytest.mark.parametrize("run", [*RUNS, "compare"])
def test_their_reports_are_written_again(runs: Path, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs / run)]) == 0
    page = (runs / run / "report.html").read_text(encoding="utf-8")
    assert "user-level differentially private with ε" in page
    assert "report:" in capsys.readouterr().out


@pytest.mark.parametrize("run", RUNS)
def test_their_statements_command_still_finds_the_stated_epsilon(
    runs: Path, run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs / run)
    stated = json.loads(Path("privacy.json").read_text(encoding="utf-8"))
    command = shlex.split(stated["recompute"])
    assert command[:3] == ["python", "-m", "experiments.run"]
    assert main(command[3:]) == 0
    found = json.loads(capsys.readouterr().out)["epsilon"]
    # Today's bounds are others, of the same ε: both intervals hold it.
    assert max(found["lower"], stated["epsilon"]["lower"]) <= min(found["upper"], stated["epsilon"]["upper"])
    assert found["upper"] == pytest.approx(stated["epsilon"]["upper"], rel=1e-3)


@pytest.mark.parametrize("run", RUNS)
def test_their_plans_account_for_their_ledgers(runs: Path, run: str) -> None:
    plan = _plan_of(RunFolder(runs / run))
    with Ledger.open(runs / run / "ledger.jsonl") as ledger:
        assert merged([plan.step_event()] * len(ledger)) == ledger.event()
    assert plan.name == run.split("/")[-1].split("-")[0]
    assert isinstance(plan.mechanism, RandomisedLaplace) == ("laplace" in run)
    assert isinstance(plan.mechanism, MatrixNoise) == ("matrix" in run)
    assert (plan.clip_rule is not None) == ("quantile" in run)


def test_their_configurations_are_read_under_todays_names(runs: Path) -> None:
    written = json.loads((runs / "uls-laplace/config.json").read_text(encoding="utf-8"))
    config = stored_config(RunConfig, written, "x")
    assert config.plan.mechanism_options == ("noise-file=runs/noise.json",)
    assert config.plan.mechanism == "randomised-laplace"


def test_going_on_with_them_is_refused_with_the_reason(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "uls-quantile/summary.json").unlink()
    assert main(["train", "--resume", str(runs / "uls-quantile")]) == 2
    assert "another version of fedsim" in capsys.readouterr().err.lower()
    assert main(["compare", "--resume", str(runs / "compare")]) == 2
