"""Alarms: each sounds when it should, once, and stays silent otherwise."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import trained

from fedsim.config import EvaluationConfig, OptimizerConfig
from fedsim.errors import Failure
from fedsim.models.export import ExportMismatch
from fedsim.plan import UlsPlan
from fedsim.privacy.ledger import read_entries
from fedsim.release import Release
from fedsim.rows import SizeCounts
from fedsim.sampling import CyclicPoisson, Poisson, Turns
from fedsim.terminal import speak
from server import app
from server.alarms import HOPELESS, NOT_PRIVATE, Alarms, noise_to_signal
from server.checkpoint import read_latest
from server.evaluation import HeldOut, HeldOutDiverged, Measurement
from server.round import Diverged

PLAN = UlsPlan(
    num_users=1000, sampling_probability=0.1, group_size=2, clip_norm=1.0, noise_multiplier=1.0, steps=25, delta=1e-4
)
QUIET = {"units": 60.0, "clipped_units": 20.0, "nonfinite_units": 0.0, "empty_units": 0.0}
USERS = SizeCounts.counted(np.full(100, 3))
UNKNOWN = Measurement(
    loss=math.nan, accuracy=0.0, perplexity=math.nan, user_losses=np.array([math.nan]), users=np.array([0])
)


@pytest.fixture(autouse=True)
def speaking() -> None:
    """As in a program: warnings are printed."""
    speak()


def alarms(*, size: int = 1000, private_too: bool = True) -> Alarms:
    return Alarms(PLAN, size, private_too=private_too)


def test_a_healthy_run_sounds_none(capsys) -> None:
    healthy = alarms()
    healthy.before_training(USERS)
    healthy.after_round(QUIET)
    healthy.after_training(())
    assert healthy.sounded == {}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"clipped_units": 60.0}, "clips-everyone"),
        ({"clipped_units": 0.0}, "clips-no-one"),
        ({"nonfinite_units": 2.0}, "not-finite"),
        ({"empty_units": 1.0}, "empty-loss"),
    ],
)
def test_what_a_round_shows(change: dict[str, float], name: str, capsys) -> None:
    sounding = alarms()
    for _ in range(2):
        sounding.after_round({**QUIET, **change})
    assert list(sounding.sounded) == [name]
    printed = capsys.readouterr().err
    assert printed.count("warning:") == 1
    assert NOT_PRIVATE in printed
    silent = alarms(private_too=False)
    silent.after_round({**QUIET, **change})
    assert silent.sounded == {}


def test_few_units_say_nothing_about_the_clip_norm() -> None:
    few = alarms()
    few.after_round({**QUIET, "units": 10.0, "clipped_units": 10.0})
    assert few.sounded == {}


def test_noise_that_drowns_everything_is_said_before_training_with_what_helps() -> None:
    size = int((2 * HOPELESS * 100 * 5) ** 2)
    assert noise_to_signal(PLAN, size) == pytest.approx(2 * HOPELESS)
    for private_too in (True, False):  # made of public numbers alone
        drowned = alarms(size=size, private_too=private_too)
        drowned.before_training(USERS)
        assert list(drowned.sounded) == ["noise"]
    words = drowned.sounded["noise"]
    assert "40 times as long" in words
    assert "2.0 times as many users" in words
    assert "4 times fewer parameters" in words


@pytest.mark.parametrize(
    "noise",
    [
        {"sampling": Poisson()},
        {"sampling": CyclicPoisson(groups=3), "noise_coefficients": (1.0, 0.6, 0.4)},
        {"sampling": Turns(), "noise_buffers": ((0.6, 0.9),)},
    ],
)
def test_the_ratio_is_that_of_simulated_noise(noise: dict[str, Any]) -> None:
    plan = dataclasses.replace(PLAN, sampling_probability=0.1, **noise)
    release = Release(plan, {"w": 5000}, 0)
    rounds = (
        release.noised_mean(np.zeros(5000, dtype=np.float32), release.clip, number) for number in range(plan.steps)
    )
    signal = plan.steps * plan.clip_norm  # every expected user pulls the same way, at full length
    assert np.linalg.norm(sum(rounds)) / signal == pytest.approx(noise_to_signal(plan, 5000), rel=0.05)


def test_users_with_one_example_are_counted_and_marked() -> None:
    lonely = SizeCounts.counted(np.repeat([1, 3], [70, 30]))
    sounding = alarms()
    sounding.before_training(lonely)
    assert list(sounding.sounded) == ["single-examples"]
    assert "70%" in sounding.sounded["single-examples"]
    silent = alarms(private_too=False)
    silent.before_training(lonely)
    assert silent.sounded == {}


def test_parameters_that_did_not_move_are_named() -> None:
    stuck = alarms()
    stuck.after_training(("a", "b", "c", "d", "e"))
    assert "a, b, c and 2 more" in stuck.sounded["unchanged"]


def test_a_run_whose_weights_cannot_change_says_so_in_its_summary(small_run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fedsim.optimizer.ServerOptimizer.step", lambda self, mean: None)
    summary: dict[str, Any] = trained(small_run(tmp_path))
    assert "unchanged" in {alarm["alarm"] for alarm in summary["alarms"]}
    assert json.loads((tmp_path / "summary.json").read_text())["alarms"] == summary["alarms"]


@pytest.mark.parametrize(
    ("optimizer", "every", "failure"),
    [
        (OptimizerConfig(name="momentum", learning_rate=3e38), 9, Diverged),  # weights
        (OptimizerConfig(name="sgd", learning_rate=1e33), 2, HeldOutDiverged),  # finite weights, but no loss
    ],
)
def test_what_is_no_longer_finite_ends_the_run_before_more_is_charged(
    small_run, tmp_path: Path, optimizer: OptimizerConfig, every: int, failure: type[Failure]
) -> None:
    config = small_run(
        tmp_path, optimizer=optimizer, evaluation=EvaluationConfig(every=every, max_rows=20, test_rows=20)
    )
    with pytest.raises(failure, match=r"a lower --optimizer\.learning-rate") as raised:
        trained(config)
    assert "round 2: the held-out loss is nan: ε = " in str(raised.value) or failure is Diverged
    kept = read_latest(tmp_path / "checkpoints")
    assert kept is None or np.isfinite(kept.arrays["parameters"]).all()
    assert not (tmp_path / "model").exists()
    spent = (tmp_path / "ledger.jsonl").read_bytes()
    assert 1 <= len(read_entries(tmp_path / "ledger.jsonl")) <= every
    # Going on at the same learning rate would only spend more.
    with pytest.raises(Failure, match=r"a lower --optimizer\.learning-rate"):
        trained(dataclasses.replace(config, resume=str(tmp_path)))
    assert (tmp_path / "ledger.jsonl").read_bytes() == spent


def test_a_model_without_a_loss_is_found_before_anything_is_charged(small_run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(HeldOut, "validation", lambda *_: UNKNOWN)
    with pytest.raises(HeldOutDiverged, match="nothing is charged"):
        trained(small_run(tmp_path))
    assert read_entries(tmp_path / "ledger.jsonl") == ()


def test_an_export_that_is_not_the_model_loses_no_work(small_run, tmp_path: Path, monkeypatch) -> None:
    config = small_run(tmp_path)

    def differs(*arguments: Any, **further: Any) -> None:
        raise ExportMismatch(1.0, 2.0)

    with monkeypatch.context() as patched:
        patched.setattr(app, "export", differs)
        with pytest.raises(ExportMismatch):
            trained(config)
    spent = (tmp_path / "ledger.jsonl").read_bytes()
    assert not (tmp_path / "summary.json").exists()
    trained(dataclasses.replace(config, resume=str(tmp_path)))
    assert (tmp_path / "ledger.jsonl").read_bytes() == spent
    assert (tmp_path / "model/model.safetensors").exists()


@pytest.mark.parametrize("clipped", [60.0, 0.0])
def test_without_noise_no_advice_is_given_about_the_clip_norm(clipped: float) -> None:
    free = Alarms(dataclasses.replace(PLAN, noise_multiplier=0.0), 1000, private_too=True)
    free.after_round({**QUIET, "clipped_units": clipped})
    assert free.sounded == {}
