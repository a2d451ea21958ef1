"""Going on with a run whose noise is correlated over rounds: repeating what was released, or saying why not."""

import dataclasses
import itertools
import json
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crashes import Crash, charges, crash_after, crashed, releases, weights
from small_runs import ROUNDS, trained

from fedsim.config import CheckpointConfig, EngineConfig, NoiseConfig, OptimizerConfig, RunConfig
from fedsim.plan import plan_from_values
from fedsim.randomness import StreamNoise
from fedsim.release import ReleasesLost
from server.round import Round


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
    assert kept == [f"0000-{round:08d}.safetensors" for round in (2, 3, 4)]  # since the older of two checkpoints
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "releases").iterdir()} == {0o600}
    summary = trained(again)
    lost, repeated = (move for move in seen if move[0] == 4)
    np.testing.assert_array_equal(lost[1], repeated[1])
    np.testing.assert_array_equal(lost[2], repeated[2])
    assert summary["rounds"] == ROUNDS
    # Round 5 was charged and never released: it used its charge.
    assert charges(tmp_path / "ledger.jsonl") == list(range(ROUNDS))
    assert not (tmp_path / "releases").exists()


def test_noise_goes_on_as_it_would_have_where_a_run_was_not_interrupted(
    small_run, tmp_path: Path, monkeypatch
) -> None:
    for exact in (False, True):
        engine = EngineConfig(kind="local", workers=1, exact=exact)
        trained(banded(small_run(tmp_path / f"whole-{exact}"), engine=engine))
        trained(crashed(banded(small_run(tmp_path / f"run-{exact}"), engine=engine), monkeypatch))
        assert weights(tmp_path / f"run-{exact}") == weights(tmp_path / f"whole-{exact}")


@pytest.mark.parametrize("buffers", [0, 2])
def test_without_sampling_a_run_goes_on_as_it_would_have(small_run, tmp_path: Path, monkeypatch, buffers: int) -> None:
    def turns(folder: Path) -> RunConfig:
        config = small_run(folder)
        plan = dataclasses.replace(config.plan, sampling="none", bands=None if buffers else "3", buffers=buffers)
        return dataclasses.replace(config, plan=plan)

    trained(turns(tmp_path / "whole"))
    trained(crashed(turns(tmp_path / "run"), monkeypatch))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert charges(tmp_path / "run/ledger.jsonl") == list(range(ROUNDS))
    statement = json.loads((tmp_path / "run/privacy.json").read_text())
    # 48 training users in three groups: four turns of one of them.
    plan = plan_from_values(json.loads((tmp_path / "run/config.json").read_text())["plan"])
    assert (plan.scheme.separation, len(plan.noise_buffers)) == (3, buffers)
    assert statement["epsilon"]["upper"] == plan.epsilon().upper
    assert "--sampling none --groups 3" in statement["recompute"]


def test_releases_that_were_lost_are_not_made_anew_unless_told_to_and_then_charged_on_top(
    small_run, tmp_path: Path, monkeypatch, caplog
) -> None:
    again = crashed(banded(small_run(tmp_path), noise_seed=None), monkeypatch)
    (tmp_path / "releases/0000-00000004.safetensors").unlink()
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


def interrupted(config: RunConfig, monkeypatch: pytest.MonkeyPatch, rounds: int = 5) -> RunConfig:
    """Run, or go on, until so many rounds have run, and end there; returns how to go on."""
    with monkeypatch.context() as patch:
        crash_after(patch, rounds)
        with pytest.raises(Crash):
            trained(config)
    return dataclasses.replace(config, resume=config.output, noise=NoiseConfig(lost_releases="refuse"))


def lose_releases(folder: Path, config: RunConfig) -> RunConfig:
    """How to go on once all releases are lost."""
    shutil.rmtree(folder / "releases")
    with pytest.raises(ReleasesLost):
        trained(config)
    return dataclasses.replace(config, noise=NoiseConfig(lost_releases="restart"))


def test_a_crash_after_a_new_chain_repeats_that_chains_releases(small_run, tmp_path: Path, monkeypatch) -> None:
    again = interrupted(banded(small_run(tmp_path), noise_seed=None), monkeypatch)
    restarted = lose_releases(tmp_path, again)
    seen = releases(monkeypatch)
    trained(interrupted(restarted, monkeypatch, rounds=1))
    (first, repeated) = (move for move in seen if move[0] == 4)
    np.testing.assert_array_equal(first[1], repeated[1])
    np.testing.assert_array_equal(first[2], repeated[2])
    assert charges(tmp_path / "ledger.jsonl") == [0, 1, 2, 3, 4, 5, *range(4, ROUNDS)]


def test_no_two_chains_share_cohorts_or_noise(small_run, tmp_path: Path, monkeypatch) -> None:
    seen = releases(monkeypatch)
    again = interrupted(banded(small_run(tmp_path), noise_seed=None), monkeypatch)
    for rounds in (1, 3):  # lost at once, and after another checkpoint
        again = interrupted(lose_releases(tmp_path, again), monkeypatch, rounds=rounds)
    trained(lose_releases(tmp_path, again))
    for number in (4, 6):
        moves = [move for move in seen if move[0] == number]
        assert len(moves) >= 2
        for first, second in itertools.combinations(moves, 2):
            assert not np.array_equal(first[1], second[1])
            assert abs(np.corrcoef(first[2], second[2])[0, 1]) < 0.3


def test_a_release_that_left_is_known_to_have_though_nothing_else_is_left_of_it(
    small_run, tmp_path: Path, monkeypatch
) -> None:
    def once(self: Round, number: int, *given: object) -> None:
        if number == 4:
            raise Crash
        step(self, number, *given)

    step = Round._step
    again = dataclasses.replace(banded(small_run(tmp_path), noise_seed=None), resume=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Round, "_step", once)
        with pytest.raises(Crash):
            trained(dataclasses.replace(again, resume=None))
    assert charges(tmp_path / "ledger.jsonl") == [0, 1, 2, 3, 4]
    shutil.rmtree(tmp_path / "releases")
    with pytest.raises(ReleasesLost, match="round 4 may have been released"):
        trained(again)


def test_what_is_kept_must_be_what_left(small_run, tmp_path: Path, monkeypatch) -> None:
    again = crashed(banded(small_run(tmp_path), noise_seed=None), monkeypatch)
    shutil.copy(tmp_path / "releases/0000-00000003.safetensors", tmp_path / "releases/0000-00000004.safetensors")
    with pytest.raises(ReleasesLost, match="what is kept is another"):
        trained(again)


def test_a_release_that_the_ledger_forgot_is_charged_before_it_is_repeated(
    small_run, tmp_path: Path, monkeypatch
) -> None:
    trained(banded(small_run(tmp_path / "whole")))
    again = crashed(banded(small_run(tmp_path / "run")), monkeypatch)
    ledger = tmp_path / "run/ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[: 1 + 2 * 4]))  # a copy of when round 3 had left
    trained(again)
    assert charges(ledger) == list(range(ROUNDS))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_noise_that_other_software_would_draw_otherwise_is_not_gone_on_with(
    small_run, tmp_path: Path, monkeypatch
) -> None:
    again = crashed(banded(small_run(tmp_path), noise_seed=None), monkeypatch)
    normal = StreamNoise.add_normal
    monkeypatch.setattr(StreamNoise, "add_normal", lambda self, total, std: normal(self, total[::-1], std))
    with pytest.raises(ReleasesLost, match="cannot be drawn again by this software"):
        trained(again)


def test_a_damaged_checkpoint_sends_a_run_with_correlated_noise_further_back(
    small_run, tmp_path: Path, monkeypatch
) -> None:
    trained(banded(small_run(tmp_path / "whole")))
    again = crashed(banded(small_run(tmp_path / "run")), monkeypatch)
    (tmp_path / "run/checkpoints/00000004/arrays.safetensors").write_bytes(b"")
    trained(again)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert charges(tmp_path / "run/ledger.jsonl") == list(range(ROUNDS))


def test_without_checkpoints_nothing_is_kept_and_a_lost_run_says_so(small_run, tmp_path: Path, monkeypatch) -> None:
    off = CheckpointConfig(rounds=0, minutes=0)
    again = crashed(banded(small_run(tmp_path), checkpoint=off), monkeypatch)
    assert not (tmp_path / "releases").exists()
    with pytest.raises(ReleasesLost, match="round 0 may have been released"):
        trained(again)
    with pytest.raises(ReleasesLost, match="round 0 may have been released"):
        trained(dataclasses.replace(again, checkpoint=CheckpointConfig(rounds=2)))
