"""Training that goes on from a finished run states what both cost together."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from crashes import crashed
from peft import LoraConfig, get_peft_model
from small_runs import ROUNDS, trained
from transformers import AutoModelForCausalLM

from experiments.run import main
from experiments.train import Train
from fedsim.config import PlanConfig, RunConfig
from fedsim.models.config import ModelConfig
from fedsim.plan import plan_from_values
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.earlier import Earlier, digest_of, mark_of
from fedsim.privacy.events import Composed
from fedsim.privacy.ledger import read_entries
from server.results.run_folder import RunFolder

DELTA = 1e-3
PLAN = PlanConfig(rounds=3, gradients_per_round=16, delta=DELTA, noise_multiplier=2.0, epsilon=1000.0, clip_norm=0.5)


@pytest.fixture
def run(small_run, tmp_path: Path):
    """run(name, after=None, plan=PLAN, **changes): its configuration, begun with the result of another."""

    def configured(name: str, after: str | Path | None = None, plan: PlanConfig = PLAN, **changes):
        model = small_run(tmp_path).model if after is None else ModelConfig(path=str(tmp_path / after))
        return small_run(tmp_path / name, plan=plan, model=model, **changes)

    return configured


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run is kept that several tests go on from."""
    return tmp_path_factory.mktemp("finished") / "x"


@pytest.fixture
def begun(run, finished: Path, tmp_path: Path) -> None:
    """There is a finished run "x", with noise over two rounds, whose users take turns."""
    if not finished.exists():
        trained(run("x", plan=dataclasses.replace(PLAN, bands="2")))
        shutil.copytree(tmp_path / "x", finished)
    else:
        shutil.copytree(finished, tmp_path / "x")


def statement(folder: Path) -> dict:
    return json.loads((folder / "privacy.json").read_text())


def planned(folder: Path):
    return plan_from_values(json.loads((folder / "config.json").read_text())["plan"])


def test_a_run_continued_twice_gives_the_statement_of_the_whole(run, begun, tmp_path: Path, capsys) -> None:
    trained(run("y", "x", dataclasses.replace(PLAN, algorithm="els", group_size=2, noise_multiplier=3.0)))
    limited = dataclasses.replace(PLAN, bands="2", noise_multiplier=None, epsilon=3.0)
    summary = trained(run("z", "y/model", limited))
    plans = [planned(tmp_path / name) for name in "xyz"]
    whole = epsilon_bounds(Composed(events=tuple(plan.event() for plan in plans)), DELTA).upper
    said = statement(tmp_path / "z")
    assert said["epsilon"]["upper"] == pytest.approx(whole, rel=2e-3)
    assert summary["epsilon"] == said["epsilon"]["upper"]
    assert 2.9 < whole <= 3.0
    assert (summary["rounds"], said["steps"]) == (3, 3)
    # It is neither this run alone nor a sum of numbers.
    alone = [epsilon_bounds(plan.event(), DELTA).upper for plan in plans]
    assert alone[2] * 1.01 < whole < sum(alone) * 0.99
    assert Earlier.in_ledger(read_entries(tmp_path / "z/ledger.jsonl")).names == ("x", "y")
    assert "The models of this run and of what it went on from (x, y) together" in said["in_words"]
    first = json.loads((tmp_path / "z/metrics.jsonl").read_text().splitlines()[0])
    assert first["epsilon"] == pytest.approx(statement(tmp_path / "y")["epsilon"]["upper"], rel=2e-3)
    # What the folder states is confirmed by a second method, and by the command it gives.
    assert main(["account", "--check", str(tmp_path / "z")]) == 0
    capsys.readouterr()
    command = said["recompute"].split()[3:]
    command[command.index("--ledger") + 1] = str(tmp_path / "z/ledger.jsonl")
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"]["upper"] == pytest.approx(whole, rel=2e-3)


def test_a_spent_budget_is_a_sentence_and_nothing_is_touched(run, begun, tmp_path: Path, capsys) -> None:
    before = sorted(tmp_path.rglob("*"))
    arguments = ["train", "--model.path", str(tmp_path / "x"), "--output", str(tmp_path / "y")]
    assert main([*arguments, "--plan.epsilon", "0.5", "--plan.delta", str(DELTA)]) == 2
    assert "has spent of the same people" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_that_is_moved_alone_takes_its_ledger_along(run, begun, tmp_path: Path, capsys) -> None:
    moved = shutil.copytree(tmp_path / "x/model", tmp_path / "moved")
    spent = statement(tmp_path / "x")["epsilon"]["upper"]
    shutil.rmtree(tmp_path / "x")
    trained(run("y", "moved"))
    assert statement(tmp_path / "y")["earlier"]["runs"] == ["moved"]
    assert statement(tmp_path / "y")["epsilon"]["upper"] > spent
    for name in ("ledger.jsonl", "privacy.json"):
        (moved / name).unlink()
    assert main(["train", "--model.path", str(moved), "--output", str(tmp_path / "z")]) == 2
    assert "put it back" in capsys.readouterr().err


def test_adapters_that_are_moved_alone_name_their_ledger(run, small_run, tmp_path: Path, capsys) -> None:
    config = run("x")
    trained(dataclasses.replace(config, model=dataclasses.replace(config.model, lora_rank=2)))
    moved = shutil.copytree(tmp_path / "x/model", tmp_path / "moved")
    assert mark_of(moved) == digest_of(tmp_path / "x/ledger.jsonl")
    shutil.rmtree(tmp_path / "x")
    trained(run("y", "moved"))
    assert statement(tmp_path / "y")["earlier"]["runs"] == ["moved"]
    for name in ("ledger.jsonl", "privacy.json"):
        (moved / name).unlink()
    assert main(["train", "--model.path", str(moved), "--output", str(tmp_path / "z")]) == 2
    assert "put it back" in capsys.readouterr().err
    assert main(["merge", str(moved), "--output", str(tmp_path / "z")]) == 2
    assert "put it back" in capsys.readouterr().err
    assert not (tmp_path / "z").exists()


def test_strange_adapters_on_a_result_carry_what_that_spent(run, begun, tmp_path: Path) -> None:
    """Of other people too, and once where the adapters' ledger tells of it."""
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "x/model")
    settings = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    get_peft_model(base, settings).save_pretrained(str(tmp_path / "theirs"))
    config = run("y", "theirs", earlier_people="others")
    assert Train(**{one.name: getattr(config, one.name) for one in dataclasses.fields(RunConfig)}).run() == 0
    said = statement(tmp_path / "y")["earlier"]
    assert (said["runs"], said["people"]) == (["x"], "others")
    trained(run("z", "theirs"))
    assert statement(tmp_path / "z")["earlier"]["people"] == "same"
    for name in ("ledger.jsonl", "privacy.json"):  # as if that run had made them
        shutil.copy(tmp_path / "y" / name, tmp_path / "theirs")
    trained(run("v", "theirs"))
    assert statement(tmp_path / "v")["earlier"]["runs"] == ["x", "theirs"]


def test_a_continued_run_that_was_killed_goes_on(run, begun, tmp_path: Path, monkeypatch) -> None:
    again = crashed(run("y", "x", dataclasses.replace(PLAN, rounds=ROUNDS, bands="2")), monkeypatch)
    shutil.move(tmp_path / "x", tmp_path / "elsewhere")
    summary = trained(dataclasses.replace(again, model=ModelConfig(path=str(tmp_path / "elsewhere"))))
    assert summary["rounds"] == ROUNDS
    entries = read_entries(tmp_path / "y/ledger.jsonl")
    assert Earlier.in_ledger(entries).names == ("x",)
    plans = [planned(tmp_path / name) for name in ("elsewhere", "y")]
    whole = epsilon_bounds(Composed(events=tuple(plan.event() for plan in plans)), DELTA).upper
    assert summary["epsilon"] == pytest.approx(whole, rel=2e-3)


def test_a_crash_before_the_earlier_charges_were_written_loses_none(run, begun, tmp_path: Path, monkeypatch) -> None:
    config = run("y", "x")

    def killed(self: Earlier, ledger: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Earlier, "carry_into", killed)
    monkeypatch.setattr(RunFolder, "_undo", lambda *_: None)  # what is killed tidies nothing up
    with pytest.raises(KeyboardInterrupt):
        trained(config)
    monkeypatch.undo()
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    trained(dataclasses.replace(config, resume=config.output))
    assert Earlier.in_ledger(read_entries(tmp_path / "y/ledger.jsonl")).names == ("x",)
