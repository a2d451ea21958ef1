"""The account command: what it prints, what it finds, what it refuses."""

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from own_kind_of_release import OWN

from experiments.account.command import Account
from experiments.run import main
from fedsim.errors import InvalidInput
from fedsim.plan import ElsPlan, Plan, UlsPlan
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import (
    EVENTS,
    Adjacency,
    BinomialMixtureGaussian,
    Composed,
    Event,
    FixedSizeSubsampledGaussian,
    Gaussian,
    PoissonSubsampledGaussian,
    Repeated,
)
from fedsim.privacy.ledger import Ledger, merged
from fedsim.statement import privacy_statement

ROOT = Path(__file__).parents[2]
PLAN = "--group-size 4 --sampling-probability 0.05 --steps 20 --delta 1e-6"


def printed(capsys: pytest.CaptureFixture[str], arguments: str) -> dict[str, Any]:
    assert main(["account", *arguments.split(), "--json"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def bounds(event: Event, **options: Any) -> dict[str, float]:
    found = epsilon_bounds(merged((event,)), 1e-6, **options)
    return {"upper": found.upper, "lower": found.lower}


def test_els_prints_both_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    result = printed(capsys, f"--algorithm els {PLAN} --noise-multiplier 2.0")
    event = BinomialMixtureGaussian(group_size=4, sampling_probability=0.05, noise_multiplier=2.0)
    assert result["epsilon"] == bounds(Repeated(event=event, count=20))
    assert result["noise_multiplier"] == 2.0
    assert result["calibrated"] is None


def test_uls_does_not_depend_on_the_group_size(capsys: pytest.CaptureFixture[str]) -> None:
    result = printed(capsys, f"--algorithm uls {PLAN} --noise-multiplier 2.0")
    event = PoissonSubsampledGaussian(sampling_probability=0.05, noise_multiplier=2.0)
    assert result["epsilon"] == bounds(Repeated(event=event, count=20))
    without = printed(capsys, "--sampling-probability 0.05 --steps 20 --delta 1e-6 --noise-multiplier 2.0")
    assert without["epsilon"] == result["epsilon"]


@pytest.mark.parametrize(
    ("left_out", "grows"),
    [("noise_multiplier", False), ("steps", True), ("sampling_probability", True), ("group_size", True)],
)
def test_what_is_left_out_is_found(left_out: str, grows: bool, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"group_size": 4, "sampling_probability": 0.05, "steps": 20, "noise_multiplier": 2.0}
    given = {name: value for name, value in values.items() if name != left_out}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
    result = printed(capsys, f"--algorithm els {flags} --delta 1e-6 --target-epsilon 2.5")
    assert result["calibrated"] == left_out
    assert result["epsilon"]["upper"] <= 2.5
    found = values | {left_out: result[left_out]}
    again = Account(algorithm="els", delta=1e-6, **found)
    assert again.result()["epsilon"]["upper"] <= 2.5
    factor = 1.01 if isinstance(result[left_out], float) else 1 + 1 / result[left_out]
    worse = result[left_out] * factor if grows else result[left_out] / factor
    whole = round(worse) if left_out in ("steps", "group_size") else worse
    beyond = Account(algorithm="els", delta=1e-6, **(values | {left_out: whole}))
    assert beyond.result()["epsilon"]["upper"] > 2.5, "the target is used up"


def test_other_sampling_and_adjacency(capsys: pytest.CaptureFixture[str]) -> None:
    rest = "--noise-multiplier 4.0 --steps 5 --delta 1e-6"
    none = printed(capsys, f"--sampling none {rest}")
    assert none["epsilon"] == bounds(Repeated(event=Gaussian(noise_multiplier=4.0), count=5))
    replaced = printed(capsys, f"--sampling none --adjacency replace-one-user {rest}")
    assert replaced["epsilon"]["lower"] > none["epsilon"]["upper"]
    els = printed(capsys, f"--algorithm els --group-size 2 --sampling none {rest}")
    assert els["epsilon"]["upper"] == pytest.approx(replaced["epsilon"]["upper"], rel=2e-3), "2 apart either way"
    poisson = printed(capsys, f"--adjacency replace-one-user --sampling-probability 0.1 {rest}")
    event = PoissonSubsampledGaussian(sampling_probability=0.1, noise_multiplier=4.0)
    assert poisson["epsilon"] == bounds(Repeated(event=event, count=5), adjacency=Adjacency.REPLACE_ONE_USER)
    fixed = printed(capsys, f"--sampling fixed-size --cohort-size 10 --population-size 100 {rest}")
    cohort = FixedSizeSubsampledGaussian(cohort_size=10, population_size=100, noise_multiplier=4.0)
    assert fixed["epsilon"] == bounds(Repeated(event=cohort, count=5))
    assert (fixed["cohort_size"], fixed["population_size"]) == (10, 100)


def test_no_steps_are_epsilon_zero_whatever_the_noise(capsys: pytest.CaptureFixture[str]) -> None:
    for noise in ("0", "1.5"):
        result = printed(capsys, f"--sampling-probability 0.1 --steps 0 --noise-multiplier {noise}")
        assert result["epsilon"] == {"upper": 0.0, "lower": 0.0}


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ("--sampling-probability 1.5 --noise-multiplier 1 --steps 1", "sampling-probability"),
        ("--sampling-probability 1.5 --noise-multiplier 0 --steps 0", "sampling-probability"),
        ("--sampling-probability 0 --noise-multiplier 1 --steps 1", "sampling-probability"),
        ("--sampling-probability nan --noise-multiplier 1 --steps 1", "sampling-probability"),
        ("--sampling-probability 0.1 --noise-multiplier 0 --steps 1", "noise-multiplier"),
        ("--sampling-probability 0.1 --noise-multiplier nan --steps 1", "noise-multiplier"),
        ("--sampling-probability 0.1 --noise-multiplier 1 --steps -1", "steps"),
        ("--sampling-probability 0.1 --noise-multiplier 1 --steps 1 --delta 1", "delta"),
        ("--sampling-probability 0.1 --noise-multiplier 1 --steps 1 --tolerance 0", "tolerance"),
        ("--sampling-probability 0.1 --noise-multiplier 1 --steps 1 --group-size 0", "group-size"),
        ("--algorithm els --group-size 0 --sampling-probability 0.1 --noise-multiplier 1 --steps 1", "group-size"),
        ("--algorithm els --sampling-probability 0.1 --noise-multiplier 1 --steps 1", "group-size"),
        ("--sampling-probability 0.1 --steps 1", "noise-multiplier"),
        ("--noise-multiplier 1 --steps 1", "sampling-probability"),
        ("--sampling-probability 0.1 --target-epsilon 3", "target-epsilon"),
        ("--sampling-probability 0.1 --noise-multiplier 1 --steps 1 --target-epsilon 3", "target-epsilon"),
        ("--sampling-probability 0.1 --steps 1 --target-epsilon -3", "target-epsilon"),
        (
            "--group-size 1000 --algorithm els --sampling-probability 1 --noise-multiplier 1 --target-epsilon 0.1",
            "target",
        ),
        ("--sampling none --sampling-probability 0.1 --noise-multiplier 1 --steps 1", "sampling-probability"),
        ("--sampling fixed-size --cohort-size 5 --noise-multiplier 1 --steps 1", "population-size"),
        (
            "--sampling fixed-size --cohort-size 5 --population-size 4 --noise-multiplier 1 --steps 1",
            "population-size",
        ),
        ("--algorithm els --group-size 2 --sampling fixed-size --noise-multiplier 1 --steps 1", "sampling"),
        ("--sampling-probability 0.1 --noise-multiplier 1 --steps 1 --plot curve.pdf", "plot"),
        ("--ledger nowhere.jsonl", "ledger"),
        ("--ledger nowhere.jsonl --steps 3", "steps"),
        ("--ledger nowhere.jsonl --target-epsilon 3", "target-epsilon"),
    ],
)
def test_bad_input_is_named_as_typed(arguments: str, field: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["account", *arguments.split()]) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert f"{field}" in caught.err.split(" is ")[0]


def test_the_statements_command_prints_the_statements_epsilon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common: dict[str, Any] = {
        "group_size": 4,
        "clip_norm": 1.0,
        "sampling_probability": 1 / 30,
        "noise_multiplier": 1.7,
        "steps": 3,
        "delta": 1.3e-6,
    }

    def check(plan: Plan, event: Event, steps: int = 3, **more: Any) -> None:
        stated = privacy_statement(plan, event, sizes={"all": 1}, steps=steps, versions={}, **more)
        command = stated.recompute
        assert command is not None
        program = "python -m experiments.run account "
        assert command.startswith(program)
        result = printed(capsys, command.removeprefix(program).removesuffix(" --json"))
        assert result["epsilon"] == stated.to_json()["epsilon"]

    uls = UlsPlan(num_users=90, **common)
    els = ElsPlan(num_examples=90, adjacency=Adjacency.REPLACE_ONE_USER, **common)
    check(uls, Repeated(event=uls.step_event(), count=3))
    check(els, Repeated(event=els.step_event(), count=7))
    check(uls, Composed(events=()), steps=0)
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path) as ledger:
        for round in range(3):
            ledger.charge(uls.step_event(), round=round)
        ledger.charge(Gaussian(noise_multiplier=30.0), round=3, purpose="metric")
        check(uls, ledger.event(), ledger=str(path))


def test_a_kind_of_release_of_ones_own_is_found_again_by_the_statements_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "own_event.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    own = importlib.import_module("own_event").Own
    request.addfinalizer(lambda: (sys.modules.pop("own_event"), EVENTS._classes.pop("own_event:own")))
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        for number in range(2):
            ledger.charge(own(noise_multiplier=3.0), round=number)
        stated = privacy_statement(
            UlsPlan(
                num_users=9,
                sampling_probability=1.0,
                group_size=1,
                clip_norm=1.0,
                noise_multiplier=3.0,
                steps=2,
                delta=1e-6,
            ),
            ledger.event(),
            sizes={"all": 1},
            steps=2,
            versions={},
            ledger=str(ledger.path),
        )
    command = stated.recompute
    assert command is not None
    assert "--modules own_event " in command

    def account(*arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
        line = [sys.executable, "-m", "experiments.run", "account", *arguments]
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)

    again = account(*shlex.split(command)[4:])
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["epsilon"] == stated.to_json()["epsilon"]
    without = account("--ledger", str(tmp_path / "ledger.jsonl"))
    assert without.returncode == 2
    assert "add --modules own_event" in without.stderr
    assert account("--modules", "own_event").returncode == 2


def test_as_a_command_it_needs_no_torch_flwr_or_ray() -> None:
    program = (
        "import sys; from experiments.run import main\n"
        f"code = main('account {PLAN} --noise-multiplier 2 --json'.split())\n"
        "loaded = [name for name in ('torch', 'flwr', 'ray', 'transformers') if name in sys.modules]\n"
        "sys.exit(code or ' '.join(loaded) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["epsilon"]["upper"] > 0


def test_people_read_a_table_and_get_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "curve.png"
    arguments = f"--algorithm els {PLAN} --noise-multiplier 2 --compare --plot {path}"
    assert main(["account", *arguments.split()]) == 0
    shown = capsys.readouterr().out
    assert "both bounds are certified" in shown
    for words in ("tight pair", "Rényi", "black-box group privacy", "Edgeworth, order 3", "estimate"):
        assert words in shown
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000


def test_the_words_never_show_less_than_the_upper_bound(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = f"--algorithm els {PLAN} --noise-multiplier 2"
    exact = printed(capsys, arguments)["epsilon"]
    assert main(["account", *arguments.split()]) == 0
    shown = capsys.readouterr().out
    assert float(shown.split("ε ≤ ")[1].split(" ")[0]) >= exact["upper"]
    assert float(shown.split("at least ")[1].split(":")[0]) <= exact["lower"]


def test_missing_values_raise_before_anything_is_computed() -> None:
    with pytest.raises(InvalidInput, match="Add --noise-multiplier, or --target-epsilon"):
        Account(sampling_probability=0.1, steps=3).run()
