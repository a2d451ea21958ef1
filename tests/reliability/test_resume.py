"""Going on with a run: the same one or none, with what was spent counted."""

import dataclasses
import json
import re
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from crashes import Crash, crash_after, crashed, releases, weights
from small_runs import ROUNDS, trained

from experiments.compare import ArmConfig, Compare
from experiments.resume import resumed
from experiments.run import main
from experiments.train import Train
from fedsim.config import EngineConfig, NoiseConfig, OptimizerConfig, RunConfig
from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig
from fedsim.privacy.ledger import Ledger, read_entries
from fedsim.resources import open_resources
from fedsim.seeds import Seeds
from server.identity import require_same, settings_of
from server.precautions.stopping import Stopped


def test_a_crash_costs_the_lost_rounds_and_nothing_else(small_run, tmp_path: Path, monkeypatch) -> None:
    trained(small_run(tmp_path / "whole"))
    again = crashed(small_run(tmp_path / "run"), monkeypatch, rounds=3)
    summary = trained(again)
    assert summary["rounds"] == ROUNDS
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    # Rounds 0 to 2 were released, round 3 was measured and charged; the checkpoint knew of two.
    charged = [entry.round for entry in read_entries(tmp_path / "run/ledger.jsonl")]
    assert charged == [0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 8, 9]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(ROUNDS + 1))
    assert [line["round"] for line in lines if "loss" in line] == [0, 3, 6, 9, 10]


def test_the_secrets_are_for_the_owner_and_gone_when_the_run_is_done(small_run, tmp_path: Path, monkeypatch) -> None:
    again = crashed(small_run(tmp_path, sampling_seed=None, noise_seed=None), monkeypatch)
    assert stat.S_IMODE((tmp_path / "secret.json").stat().st_mode) == 0o600
    kept = json.loads((tmp_path / "secret.json").read_text())
    # Amplification by sampling holds while nobody guesses who was drawn.
    assert kept["noise"].bit_length() > 200
    assert kept["sampling"].bit_length() > 200
    # A hash of the data would confirm a guess of all of it.
    private = open_resources(again).store.fingerprint
    trained(again)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert str(kept["noise"]).encode() not in content
            assert str(kept["sampling"]).encode() not in content
            assert private.encode() not in content
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("secure", [False, True])
def test_without_a_given_noise_seed_a_lost_round_samples_and_noises_anew(
    small_run, tmp_path: Path, monkeypatch, secure: bool
) -> None:
    seen = releases(monkeypatch)
    config = small_run(
        tmp_path, noise_seed=None, noise=NoiseConfig(secure=secure), optimizer=OptimizerConfig(name="sgd")
    )
    again = crashed(config, monkeypatch)
    if secure:
        assert json.loads((tmp_path / "secret.json").read_text())["noise"] is None
    trained(again)
    lost, repeated = (move for move in seen if move[0] == 4)
    assert not np.array_equal(lost[1], repeated[1])
    assert abs(np.corrcoef(lost[2], repeated[2])[0, 1]) < 0.1
    statement = json.loads((tmp_path / "privacy.json").read_text())
    assert statement["steps"] == ROUNDS + 2


def test_a_run_whose_lost_rounds_used_up_the_budget_stops_early(small_run, tmp_path: Path, monkeypatch) -> None:
    plan = dataclasses.replace(small_run(tmp_path).plan, noise_multiplier=None, epsilon=5.0)
    summary = trained(crashed(small_run(tmp_path, plan=plan), monkeypatch))
    assert summary["rounds"] == ROUNDS - 2
    assert summary["epsilon"] <= 5.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_round_under_way(small_run, tmp_path: Path, monkeypatch, number: int) -> None:
    trained(small_run(tmp_path / "whole"))
    before = signal.getsignal(number)
    crash_after(monkeypatch, 5, stop=number)
    with pytest.raises(Stopped) as caught:
        trained(small_run(tmp_path / "run"))
    assert signal.getsignal(number) is before
    assert caught.value.exit_code == 128 + number
    assert caught.value.round == 6
    assert f"--resume {tmp_path / 'run'}" in str(caught.value)
    trained(small_run(tmp_path / "run", resume=str(tmp_path / "run")))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert len(read_entries(tmp_path / "run/ledger.jsonl")) == ROUNDS  # nothing was lost, nothing charged twice


CHANGES: dict[str, Callable[[RunConfig], RunConfig]] = {
    "plan.epsilon": lambda c: dataclasses.replace(c, plan=dataclasses.replace(c.plan, epsilon=2000.0)),
    "plan.rounds": lambda c: dataclasses.replace(c, plan=dataclasses.replace(c.plan, rounds=20)),
    "plan.clip-norm": lambda c: dataclasses.replace(c, plan=dataclasses.replace(c.plan, clip_norm=0.7)),
    "optimizer.learning-rate": lambda c: dataclasses.replace(c, optimizer=OptimizerConfig(learning_rate=0.5)),
    "optimizer.average": lambda c: dataclasses.replace(c, optimizer=OptimizerConfig(average="exponential")),
    "engine.exact": lambda c: dataclasses.replace(c, engine=dataclasses.replace(c.engine, exact=True)),
    "engine.precision": lambda c: dataclasses.replace(c, engine=dataclasses.replace(c.engine, precision="bfloat16")),
    "model.checkpointing": lambda c: dataclasses.replace(c, model=dataclasses.replace(c.model, checkpointing=True)),
    "noise-seed": lambda c: dataclasses.replace(c, noise_seed=3),
    "data": lambda c: dataclasses.replace(c, data=dataclasses.replace(c.data, sequence_length=12)),
    "model": lambda c: dataclasses.replace(c, model=ModelConfig(small=dataclasses.replace(c.model.small, width=32))),
    "tokenizer": lambda c: dataclasses.replace(
        c, model=ModelConfig(small=dataclasses.replace(c.model.small, vocabulary_size=310))
    ),
}


def test_another_plan_data_tokenizer_or_model_is_refused_by_name(small_run, tmp_path: Path, monkeypatch) -> None:
    again = crashed(small_run(tmp_path), monkeypatch)
    spent = (tmp_path / "ledger.jsonl").read_bytes()
    for name, change in CHANGES.items():
        with pytest.raises(InvalidInput) as caught:
            trained(change(again))
        assert "as in the run that goes on" in str(caught.value)
        assert name in re.findall(r"[a-z][a-z.-]*[a-z]", str(caught.value))
    assert (tmp_path / "ledger.jsonl").read_bytes() == spent
    # Where and how it runs may change.
    elsewhere = dataclasses.replace(again, engine=EngineConfig(kind="local", workers=2, timeout_seconds=9.0))
    assert trained(elsewhere)["rounds"] == ROUNDS


def test_what_decides_an_exact_sums_bits_stays_beside_a_noise_seed(small_run, tmp_path: Path) -> None:
    config = small_run(tmp_path)
    for exact in (False, True):
        for seed in (None, 3):
            engine = dataclasses.replace(config.engine, exact=exact)
            fixed = settings_of(dataclasses.replace(config, engine=engine, noise_seed=seed))
            for name in ("engine.max-tokens", "engine.cpus-per-worker"):
                assert (name in fixed) == (exact and seed is not None)


def test_a_model_that_is_shared_out_stays_so_beside_a_noise_seed(small_run, tmp_path: Path) -> None:
    """Some models' gradients have other last bits then; a run of before there were groups has one device."""
    config = small_run(tmp_path)
    for seed in (None, 3):
        one = dataclasses.replace(config, noise_seed=seed)
        two = dataclasses.replace(one, engine=EngineConfig(devices_per_worker=2))
        assert "engine.devices-per-worker" not in settings_of(one)
        for before, after in ((one, two), (two, one)):
            kept = ({"settings": settings_of(before)}, {"settings": settings_of(after)})
            if seed is None:
                require_same(*kept)
            else:
                with pytest.raises(InvalidInput, match=r"^engine\.devices-per-worker is"):
                    require_same(*kept)


def test_where_sums_of_floats_are_formed_stays_beside_a_noise_seed(small_run, tmp_path: Path) -> None:
    for exact in (False, True):
        for seed in (None, 3):
            config = small_run(tmp_path, noise_seed=seed)
            server, workers = (
                dataclasses.replace(config, engine=EngineConfig(exact=exact, sums=sums))
                for sums in ("auto", "workers")
            )
            assert (settings_of(server) != settings_of(workers)) == (seed is not None and not exact)
            assert "engine.sums" not in settings_of(server)


def test_a_ledger_that_lacks_charges_is_refused(small_run, tmp_path: Path, monkeypatch) -> None:
    again = crashed(small_run(tmp_path), monkeypatch)
    ledger = tmp_path / "ledger.jsonl"
    whole = ledger.read_bytes()
    ledger.write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    with pytest.raises(InvalidInput, match=r"ledger of 4 charges or more"):
        trained(again)
    ledger.unlink()
    with pytest.raises(InvalidInput, match="Put the ledger back"):
        trained(again)
    ledger.write_bytes(whole)
    assert trained(again)["rounds"] == ROUNDS


def test_a_run_killed_before_its_first_checkpoint_begins_again_with_its_charges(
    small_run, tmp_path: Path, monkeypatch
) -> None:
    trained(small_run(tmp_path / "whole"))
    trained(crashed(small_run(tmp_path / "run"), monkeypatch, rounds=1))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert len(read_entries(tmp_path / "run/ledger.jsonl")) == ROUNDS + 2


def test_a_folder_with_a_run_is_not_mixed_with_a_new_one(small_run, tmp_path: Path, monkeypatch) -> None:
    crashed(small_run(tmp_path), monkeypatch)
    with pytest.raises(InvalidInput, match=f"--resume {tmp_path}"):
        trained(small_run(tmp_path))
    with Ledger.open(tmp_path / "other/ledger.jsonl"):
        pass
    with pytest.raises(InvalidInput, match="without a run"):
        trained(small_run(tmp_path / "other"))


def test_the_command_line_goes_on_with_the_settings_of_the_run(small_run, tmp_path: Path, monkeypatch, capsys) -> None:
    again = crashed(small_run(tmp_path), monkeypatch)
    assert resumed(Train, ["--resume", str(tmp_path)]).plan == again.plan
    assert main(["train", "--resume", str(tmp_path), "--plan.epsilon", "3"]) == 2
    assert "plan.epsilon" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").exists()
    before = (tmp_path / "ledger.jsonl").read_bytes()
    assert main(["train", f"--resume={tmp_path}"]) == 0  # finished: shown again, nothing run
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize("arguments", [["train", "--resume", "/absent"], ["account", "--resume", "runs/x"]])
def test_a_folder_without_a_run_is_refused(arguments: list[str], capsys) -> None:
    assert main(arguments) == 2
    assert "resume" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": 3}', '{"config": {}, "identity": {"plan": 1}}'])
def test_a_broken_configuration_is_refused(tmp_path: Path, content: str, capsys) -> None:
    (tmp_path / "config.json").write_text(content)
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{}", '{"sampling": "1", "noise": 2, "repeats": false}', '{"sampling": 1}'])
def test_broken_seeds_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "secret.json").write_text(content)
    with pytest.raises(InvalidInput, match="seeds"):
        Seeds.read(tmp_path / "secret.json")


def test_a_comparison_does_not_repeat_its_finished_arms(small_run, tmp_path: Path, monkeypatch, capsys) -> None:
    common = {
        item.name: getattr(small_run(tmp_path), item.name)
        for item in dataclasses.fields(RunConfig)
        if item.name != "output"
    }
    compare = Compare(output=str(tmp_path), uls=ArmConfig(group_size=2), els=ArmConfig(group_size=2), **common)
    monkeypatch.setattr(Compare, "_predict", lambda *arguments: None)
    crash_after(monkeypatch, ROUNDS + 5)
    with pytest.raises(Crash):
        compare.run()
    first = (tmp_path / "uls/ledger.jsonl").read_bytes()
    assert main(["compare", "--resume", str(tmp_path), "--els.group-size", "3"]) == 2
    assert "els.group-size" in capsys.readouterr().err
    assert main(["compare", "--resume", str(tmp_path)]) == 0
    assert (tmp_path / "uls/ledger.jsonl").read_bytes() == first
    assert [entry.round for entry in read_entries(tmp_path / "els/ledger.jsonl")].count(4) == 2
    arms = json.loads((tmp_path / "comparison.json").read_text())["arms"]
    assert [arm["algorithm"] for arm in arms] == ["uls", "els"]


def test_rows_of_tokens_are_not_what_is_in_a_checkpoint(small_run, tmp_path: Path, monkeypatch) -> None:
    """Nothing of a user's text is written to a run's folder while it runs."""
    crashed(small_run(tmp_path), monkeypatch)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"quick brown fox" not in path.read_bytes()
            assert b"user 17" not in path.read_bytes()
