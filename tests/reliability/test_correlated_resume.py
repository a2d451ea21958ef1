"""Going on with a run whose noise is correlated over rounds: repeating what was released, or saying why not."""

import dataclasses
import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crashes import Crash, crash_after, crashed, releases, weights
from small_runs import ROUNDS, trained

from fedsim.config import CheckpointConfig, EngineConfig, NoiseConfig, OptimizerConfig, RunConfig
from fedsim.plan import plan_from_values
from fedsim.privacy.ledger import read_entries
from fedsim.release import ReleasesLost


def banded(config: RunConfig, **changes: Any) -> RunConfig:
    """The same with noise correlated over three rounds, stepping by the released mean itself."""
    plan = dataclasses.replace(config.plan, bands="3")
    return dataclasses.replace(config, plan=plan, optimizer=OptimizerConfig(name="sgd"), **changes)


@pytest.mark.parametrize("secure", [False, True])
def test_with_correlated_noise_a_lost_round_is_repeated_bit_for_bit_and_not_charged_again(
    small_run, tmp_path: Path, monkeypatch, secure: bool
) -> None:
    seen = releases(monkeypatch)
    again = crashed(banded(small_run(tmp_path), noise_seed=None, noise=NoiseConfig(secure=secure)), monkeypatch)
    kept = sorted(path.name for path in (tmp_path / "releases").iterdir())
    assert kept == [f"{round:08d}.safetensors" for round in (2, 3, 4)]  # since the older of two checkpoints
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "releases").iterdir()} == {0o600}
    summary = trained(again)
    lost, repeated = (move for move in seen if move[0] == 4)
    np.testing.assert_array_equal(lost[1], repeated[1])
    np.testing.assert_array_equal(lost[2], repeated[2])
    assert summary["rounds"] == ROUNDS
    # Round 5 was charged and never released: it used its charge.
    assert [entry.round for entry in read_entries(tmp_path / "ledger.jsonl")] == list(range(ROUNDS))
    assert not (tmp_path / "releases").exists()


def test_noise_goes_on_as_it_would_have_where_a_run_was_not_interrupted(
    small_run, tmp_path: Path, monkeypatch
) -> None:
    for exact in (False, True):
        engine = EngineConfig(kind="local", workers=1, exact=exact)
        trained(banded(small_run(tmp_path / f"whole-{exact}"), engine=engine))
        trained(crashed(banded(small_run(tmp_path / f"run-{exact}"), engine=engine), monkeypatch))
        assert weights(tmp_path / f"run-{exact}") == weights(tmp_path / f"whole-{exact}")


def test_releases_that_were_lost_are_not_made_anew_unless_told_to_and_then_charged_on_top(
    small_run, tmp_path: Path, monkeypatch, caplog
) -> None:
    again = crashed(banded(small_run(tmp_path), noise_seed=None), monkeypatch)
    (tmp_path / "releases/00000004.safetensors").unlink()
    charged = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(ReleasesLost, match=r"round 4 may have been released.*--noise\.lost-releases restart"):
        trained(again)
    assert (tmp_path / "ledger.jsonl").read_bytes() == charged
    seen = releases(monkeypatch)
    summary = trained(dataclasses.replace(again, noise=NoiseConfig(lost_releases="restart")))
    assert "a new chain of correlated noise begins with round 4" in caplog.text
    assert summary["rounds"] == ROUNDS
    assert [move[0] for move in seen] == [4, 5, 6, 7, 8, 9]
    statement = json.loads((tmp_path / "privacy.json").read_text())
    assert statement["steps"] == ROUNDS + 2
    # Rounds 4 and 5 are of groups 1 and 2: those went through 4 and 4 releases, group 0 through 4 of its own.
    plan = plan_from_values(json.loads((tmp_path / "config.json").read_text())["plan"])
    assert statement["epsilon"]["upper"] == plan.epsilon(12).upper
    assert "--ledger" not in statement["recompute"]


def test_a_second_crash_after_a_new_chain_repeats_that_chains_releases(small_run, tmp_path: Path, monkeypatch) -> None:
    again = crashed(banded(small_run(tmp_path), noise_seed=None), monkeypatch)
    for path in (tmp_path / "releases").iterdir():
        path.unlink()
    restarted = dataclasses.replace(again, noise=NoiseConfig(lost_releases="restart"))
    seen = releases(monkeypatch)
    crash_after(monkeypatch, 1)
    with pytest.raises(Crash):
        trained(restarted)
    monkeypatch.undo()
    seen_again = releases(monkeypatch)
    small_run(tmp_path)
    trained(again)
    assert [move[0] for move in seen][:1] == [4]
    first, repeated = seen[0], seen_again[0]
    assert repeated[0] == 4
    np.testing.assert_array_equal(first[1], repeated[1])
    np.testing.assert_array_equal(first[2], repeated[2])


def test_a_damaged_checkpoint_sends_a_run_with_correlated_noise_further_back(
    small_run, tmp_path: Path, monkeypatch
) -> None:
    trained(banded(small_run(tmp_path / "whole")))
    again = crashed(banded(small_run(tmp_path / "run")), monkeypatch)
    (tmp_path / "run/checkpoints/00000004/arrays.safetensors").write_bytes(b"")
    trained(again)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert len(read_entries(tmp_path / "run/ledger.jsonl")) == ROUNDS


def test_without_checkpoints_nothing_is_kept_and_a_lost_run_says_so(small_run, tmp_path: Path, monkeypatch) -> None:
    off = CheckpointConfig(rounds=0, minutes=0)
    again = crashed(banded(small_run(tmp_path), checkpoint=off), monkeypatch)
    assert not (tmp_path / "releases").exists()
    with pytest.raises(ReleasesLost, match="round 0 may have been released"):
        trained(again)
