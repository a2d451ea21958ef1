"""`account --check`: what a folder states is confirmed from its own ledger, and nothing that was tampered with is."""

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from own_kind_of_release import OWN

from experiments.run import main
from fedsim.plan import UlsPlan
from fedsim.privacy.events import EVENTS, Gaussian
from fedsim.privacy.ledger import Ledger
from fedsim.statement import privacy_statement

ROOT = Path(__file__).parents[2]
WRITTEN = Path(__file__).parent / "runs_of_version_0_1"
RUNS = ["uls-quantile", "els-matrix", "uls-laplace"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder that may be tampered with."""
    return Path(shutil.copytree(WRITTEN / "els-matrix", tmp_path / "run"))


def check(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    code = main(["account", "--check", str(folder), *more])
    caught = capsys.readouterr()
    return code, caught.out + caught.err


@pytest.mark.parametrize("name", [*RUNS, "compare"])
def test_what_old_runs_state_is_confirmed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = check(WRITTEN / name, capsys)
    assert code == 0, said
    assert "contradicted" not in said
    for arm in ("uls", "els") if name == "compare" else (".",):
        for claim in ("ε ≤", "ε ≥", "charges of ledger.jsonl", "config.json", "its words say"):
            assert any(claim in line and str(WRITTEN / name / arm) in line for line in said.splitlines()), claim


def test_as_json_it_is_one_object_with_figures(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = check(WRITTEN / "compare", capsys, "--json")
    found = json.loads(said)
    assert (code, found["kind"], found["verdict"], len(found["runs"])) == (0, "check", "confirmed", 2)
    for findings in found["runs"].values():
        upper = next(one for one in findings if "ε ≤" in one["in_words"])
        assert upper["delta"] == pytest.approx(0.001, rel=1e-3)
        assert 0 < upper["error"] < 1e-9


def scaled(*path: str, by: float) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] *= by

    return change


def step(**changed: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        repeated = values["event"]["events"][0]
        repeated.update({key: value for key, value in changed.items() if key == "count"})
        repeated["event"].update({key: value for key, value in changed.items() if key != "count"})

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (scaled("epsilon", "upper", by=0.99), "ε ≤"),
        (scaled("epsilon", "lower", by=1.01), "ε ≥"),
        (scaled("delta", by=0.5), "ε ≤"),
        (scaled("delta", by=2.0), "ε ≥"),
        (scaled("delta", by=0.5), "not so that δ"),
        (lambda values: values.update(adjacency="replace-one-user"), "ε ≤"),
        (lambda values: values.update(adjacency="replace-one-user"), "those of config.json"),
        (lambda values: values.update(in_words=values["in_words"].replace("ε = 8", "ε = 7")), "its words say"),
        (scaled("epsilon", "upper", by=1.001), "summary.json"),
        (step(count=3), "charges of ledger.jsonl"),
        (step(noise_multiplier=0.8), "charges of ledger.jsonl"),
    ],
)
def test_a_statement_that_was_tampered_with_is_contradicted(
    run: Path, change: Callable[[dict[str, Any]], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "privacy.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")
    code, output = check(run, capsys)
    assert code == 1
    assert any("contradicted: " in line and said in line for line in output.splitlines()), output
    assert "failed: what" in output
    code, output = check(run, capsys, "--json")
    assert code == 1
    assert json.loads(output.splitlines()[0])["verdict"] == "contradicted"


def test_a_ledger_that_was_tampered_with_is_contradicted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "ledger.jsonl"
    written = path.read_text(encoding="utf-8")
    lines = written.splitlines(keepends=True)
    for changed in (
        written.replace("0.73064", "0.83064", 1),  # more noise than there was
        "".join(lines[:2] + lines[3:]),  # a charge less, in the middle
        "".join(lines[:-1]),  # and at the end, which no checksum sees
        "".join(lines[:1]),
    ):
        assert changed != written
        path.write_text(changed, encoding="utf-8")
        code, output = check(run, capsys)
        assert code == 1
        assert "contradicted: " in output


def test_a_ledger_with_a_charge_more_is_contradicted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Ledger.open(run / "ledger.jsonl") as ledger:
        ledger.charge(ledger.entries[0].event, round=9)
    code, output = check(run, capsys)
    assert code == 1
    for claim in ("5 charges", "ε ≤"):
        assert any("contradicted: " in line and claim in line for line in output.splitlines())


def test_of_a_sweep_every_point_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c.partial"):
        shutil.copytree(WRITTEN / "uls-quantile", tmp_path / name)
    (tmp_path / "c.partial/privacy.json").write_text("{", encoding="utf-8")
    nothing = Path(shutil.copytree(WRITTEN / "uls-quantile", tmp_path / "without"))
    values = json.loads((nothing / "privacy.json").read_text(encoding="utf-8"))
    values |= {"private": False, "epsilon": {"upper": None, "lower": None}}
    (nothing / "privacy.json").write_text(json.dumps(values), encoding="utf-8")
    code, output = check(tmp_path, capsys)
    assert code == 0
    assert output.count("ε ≤") == 2
    assert f"{nothing}: states no guarantee" in output
    code, output = check(nothing, capsys)
    assert code == 1, "nothing was confirmed"
    assert "states no guarantee" in output
    (tmp_path / "b/ledger.jsonl").write_text("", encoding="utf-8")
    assert check(tmp_path, capsys)[0] == 1


def test_bad_input_is_told_from_contradiction(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(run.parent / "nowhere", capsys)[0] == 2
    code, output = check(run, capsys, "--steps", "3")
    assert code == 2
    assert "steps is 3; it must be left out with --check" in output
    (run / "ledger.jsonl").rename(run / "elsewhere.jsonl")
    assert check(run, capsys)[0] == 2
    for text in ("{", "[]", '{"private": true}'):
        (run / "privacy.json").write_text(text, encoding="utf-8")
        code, output = check(run, capsys)
        assert code == 2
        assert "privacy.json" in output


def stated(folder: Path, event: Any, plan: UlsPlan) -> dict[str, Any]:
    """A folder with a ledger of two releases, and the statement of them."""
    with Ledger.open(folder / "ledger.jsonl") as ledger:
        for number in range(2):
            ledger.charge(event, round=number)
        statement = privacy_statement(plan, ledger.event(), sizes={"all": 1}, steps=2, versions={}).to_json()
    (folder / "privacy.json").write_text(json.dumps(statement), encoding="utf-8")
    return statement


PLAN = UlsPlan(
    num_users=9, sampling_probability=1.0, group_size=1, clip_norm=1.0, noise_multiplier=3.0, steps=2, delta=1e-6
)


def test_the_statement_names_the_command_and_it_needs_no_torch(tmp_path: Path) -> None:
    command = shlex.split(stated(tmp_path, PLAN.step_event(), PLAN)["check"])
    assert command[:3] == ["python", "-m", "experiments.run"]
    program = (
        "import sys; from experiments.run import main\n"
        f"code = main({command[3:]!r})\n"
        "loaded = [name for name in ('torch', 'flwr', 'ray', 'transformers') if name in sys.modules]\n"
        "sys.exit(code or ' '.join(loaded) or 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "confirmed in" in done.stdout


def test_a_kind_of_release_of_ones_own_cannot_be_checked_and_that_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "own_release.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    own = importlib.import_module("own_release").Own
    request.addfinalizer(lambda: (sys.modules.pop("own_release"), EVENTS._classes.pop("own_release:own")))
    command = stated(tmp_path, own(noise_multiplier=3.0), PLAN)["check"]
    assert command.endswith("--check . --modules own_release")
    code, output = check(tmp_path, capsys, "--modules", "own_release")
    assert code == 1
    assert "cannot tell: the second method does not know what was released" in output
    assert "own_release:own" in output
    stated_again = stated(Path(tmp_path / "plain"), Gaussian(noise_multiplier=3.0), PLAN)
    assert stated_again["check"].endswith("--check .")
    assert check(tmp_path / "plain", capsys)[0] == 0
