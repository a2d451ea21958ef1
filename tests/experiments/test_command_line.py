"""The command line: bad input ends in exit code 2, naming the field, the value and what is allowed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_flags import LOCAL, SMALL

from experiments.account.command import Account
from experiments.run import COMMANDS, main
from fedsim.engine.ray_grid import WorkersDidNotStart
from fedsim.errors import Failure
from fedsim.models.export import ExportMismatch
from fedsim.privacy.ledger import LedgerDamaged
from server.dispatch import RoundFailed
from server.evaluation import EvaluationFailed
from server.round import Diverged

ROOT = Path(__file__).resolve().parents[2]


def run(arguments: list[str], capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Exit code and everything printed."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    # tyro draws boxes and breaks lines; the words are what counts.
    return code, " ".join((printed.out + printed.err).replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--plan.epsilonn", "3"], ["--plan.epsilonn", "--plan.epsilon"]),
        (["train", "--plan.epsilon", "0"], ["plan.epsilon", "0.0", "above 0"]),
        (["train", "--plan.epsilon", "inf"], ["plan.epsilon", "inf", "--plan.allow-no-privacy"]),
        (["train", "--plan.group-size", "0"], ["plan.group-size", "0", "at least 1"]),
        (["compare", "--uls.group-size", "0"], ["uls.group-size", "0", "at least 1"]),
        (["compare", "--els.clip-norm", "0"], ["els.clip-norm", "0", "above 0"]),
        (["compare", "--els.learning-rate", "-1"], ["els.learning-rate", "-1", "above 0"]),
        (["train", "--plan.rounds", "many"], ["--plan.rounds", "many"]),
        (["train", "--plan.algorithm", "fedavg"], ["--plan.algorithm", "fedavg", "uls", "els"]),
        (
            ["train", "--data.source", "files", "--data.path", "/absent.jsonl"],
            ["data.path", "/absent.jsonl"],
        ),
        (["train", "--output", "/proc/nothing"], ["output", "/proc/nothing", "can be written"]),
        (["train", "--preset", "nonsense"], ["preset", "nonsense"]),
        (["nonsense"], ["command", "nonsense", "train"]),
        (["report", "/absent"], ["folder", "/absent", "exists"]),
        (["account", "--algorithm", "els", "--group-size", "0"], ["group-size", "0"]),
        (
            [
                "account",
                "--algorithm",
                "uls",
                "--sampling-probability",
                "1.5",
                "--noise-multiplier",
                "1",
                "--steps",
                "9",
                "--delta",
                "1e-6",
            ],
            ["sampling-probability", "1.5"],
        ),
    ],
)
def test_bad_input_is_named(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture) -> None:
    code, printed = run(arguments, capsys)
    assert code == 2, printed
    assert "Traceback" not in printed
    for word in words:
        assert word in printed


FAILURES = [
    RoundFailed("round 3: no worker is left"),
    EvaluationFailed("no worker has come up in 5 s"),
    Diverged(3),
    ExportMismatch(1.0, 2.0),
    LedgerDamaged("ledger.jsonl", 2, "not what was written"),
    WorkersDidNotStart("2 of 2 workers not ready in 5 s"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_failure_is_one_sentence_whichever_command_it_ends(
    failure: Failure, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Account) -> int:
        raise failure

    monkeypatch.setattr(Account, "run", fail)
    assert run(["account"], capsys) == (1, f"failed: {failure}")


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "posts.jsonl"
    path.write_text(json.dumps({"author": "a", "body": "some text that is long enough"}) + "\n")
    code, printed = run(
        ["train", "--data.source", "files", "--data.path", str(path), "--data.user-column", "writer",
         "--data.text-column", "body", "--model.small.steps", "0", "--output", str(tmp_path / "out")],
        capsys,
    )  # fmt: skip
    assert code == 2, printed
    assert "data.user-column" in printed
    assert "writer" in printed
    assert "author" in printed


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_is_for_people(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    code, printed = run(arguments, capsys)
    assert code == 0
    assert len(printed) > 100


def test_accounting_needs_no_torch() -> None:
    script = (
        "import sys; from experiments.run import main; "
        "code = main(['account', '--algorithm', 'uls', '--sampling-probability', '0.01', '--noise-multiplier', '1.0', "
        "'--steps', '10', '--delta', '1e-6', '--json']); "
        "heavy = {'torch', 'flwr', 'ray', 'transformers'} & set(sys.modules); "
        "sys.exit(code or (str(heavy) if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["epsilon"]["upper"] > 0


def test_sigterm_outside_of_rounds_says_how_to_go_on(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "experiments.run", "train", *SMALL, *LOCAL, "--output", str(tmp_path / "run")]
    environment = {**os.environ, "FEDSIM_CACHE": str(tmp_path / "cache")}  # an empty cache: it prepares for a while
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as running:
        assert running.stderr is not None
        first = running.stderr.readline()  # it has begun to prepare
        running.send_signal(signal.SIGTERM)
        said = first + running.stderr.read()
    assert running.returncode == 128 + signal.SIGTERM, said
    assert "nothing was begun; give the same command again" in said
    assert "terminated" in said
