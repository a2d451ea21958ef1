"""Trackers' files hold every metric, and nothing that is not private where a model is to be released."""

import dataclasses
import importlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from crashes import crashed
from small_runs import ROUNDS, trained
from tracker_files import TRACKERS, at_home, files_of, found_by

from experiments.run import main
from fedsim.config import NoiseConfig, RunConfig, from_flat
from fedsim.errors import InvalidInput
from fedsim.resources import open_resources
from server.callbacks import named
from server.callbacks.trackers.flat import leaves

__all__ = ["at_home"]


def numbers_in(line: dict[str, Any]) -> dict[str, float]:
    """Every number of a line of metrics but its round, by the names that trackers get."""
    return {
        name: value for name, value in leaves(line, "/").items() if isinstance(value, (int, float)) and name != "round"
    }


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def released(config: RunConfig) -> RunConfig:
    noise = NoiseConfig(secure=True)
    return dataclasses.replace(config, release=True, sampling_seed=None, noise_seed=None, noise=noise)


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_trackers_files_hold_every_metric(small_run, tmp_path: Path, at_home: Path, tracker: str) -> None:
    pytest.importorskip(tracker)
    folder = tmp_path / "run"
    summary = trained(small_run(folder, trackers=(tracker,)))
    found = found_by(tracker, folder, at_home)
    lines = lines_of(folder)
    assert sorted(found.numbers) == [line["round"] for line in lines] == list(range(ROUNDS + 1))
    for line in lines:
        expected = numbers_in(line)
        assert ("loss" in expected) == (line["round"] in (0, 3, 6, 9, 10))
        assert found.numbers[line["round"]] == pytest.approx(expected, rel=1e-6)
    told = {"train_loss", "norm_quantiles/0.5", "memory/worker_bytes", "phases/seconds/compute"}
    assert {f"not_private/{name}" for name in told} <= set(found.numbers[ROUNDS])
    assert float(found.options["plan.clip-norm"]) == small_run("").plan.clip_norm
    assert float(found.options["effective.noise-multiplier"]) == summary["noise_multiplier"]
    assert found.summary["test_loss_after"] == pytest.approx(summary["test_loss_after"], rel=1e-6)
    assert found.summary["not_private/training_seconds"] == pytest.approx(summary["training_seconds"], rel=1e-6)
    assert "seconds" not in found.summary
    assert found.summary["algorithm"] == "uls"


@pytest.mark.parametrize("kept", ["auto", "on"])
@pytest.mark.parametrize("tracker", TRACKERS)
def test_of_a_model_to_be_released_nothing_is_sent_that_is_not_private(
    small_run, tmp_path: Path, at_home: Path, monkeypatch, tracker: str, kept: str
) -> None:
    """Nor when: all of it is told at the end, by which no round's time is known."""
    pytest.importorskip(tracker)
    begun: list[int] = []
    begin = named._begin

    def noted(tracker: str, run: Any) -> Any:
        begun.append(len(lines_of(run.folder)))
        assert run.private_only
        return begin(tracker, run)

    monkeypatch.setattr(named, "_begin", noted)
    folder = tmp_path / "run"
    trained(dataclasses.replace(released(small_run(folder, trackers=(tracker,))), training_metrics=kept))
    assert begun == [ROUNDS + 1]  # once all rounds were done
    lines = lines_of(folder)
    assert bool(lines[1]["not_private"]) == (kept == "on")
    found = found_by(tracker, folder, at_home)
    for line in lines:
        assert found.numbers[line["round"]] == pytest.approx(numbers_in({**line, "not_private": {}}), rel=1e-6)
    assert "training_seconds" not in str(found.summary)
    assert "test_loss_after" in found.summary
    for path in files_of(tracker, folder, at_home):
        content = path.read_bytes()
        for private in (b"not_private", b"train_loss", b"clipped_fraction", b"tokens_per_second"):
            assert private not in content, path


@pytest.mark.parametrize("tracker", TRACKERS)
def test_seeds_and_the_datas_fingerprint_stay_at_home(
    small_run, tmp_path: Path, at_home: Path, monkeypatch, tracker: str
) -> None:
    pytest.importorskip(tracker)
    folder = tmp_path / "run"
    config = small_run(folder, trackers=(tracker,), sampling_seed=971364825, noise_seed=482913657)
    again = crashed(config, monkeypatch)
    secret = json.loads((folder / "secret.json").read_text())
    fingerprint = open_resources(config).store.fingerprint
    trained(again)
    files = files_of(tracker, folder, at_home)
    assert files
    for path in files:
        content = path.read_bytes()
        for value in (secret["sampling"], secret["noise"], config.sampling_seed, config.noise_seed, fingerprint):
            assert str(value).encode() not in content, path
        assert b"sampling-seed" not in content
        assert b"noise-seed" not in content


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_run_that_goes_on_goes_on_in_the_same_place(
    small_run, tmp_path: Path, at_home: Path, monkeypatch, tracker: str
) -> None:
    """The rounds since the checkpoint are told again; every round ends with what metrics.jsonl holds of it."""
    pytest.importorskip(tracker)
    folder = tmp_path / "run"
    again = crashed(small_run(folder, trackers=(tracker,), noise_seed=None), monkeypatch)
    key = json.loads((folder / "trackers.json").read_text())
    time.sleep(1.1)  # W&B names files of offline runs by the second
    trained(again)
    assert json.loads((folder / "trackers.json").read_text()) == key
    found = found_by(tracker, folder, at_home)
    for line in lines_of(folder):
        assert found.numbers[line["round"]] == pytest.approx(numbers_in(line), rel=1e-6)
    if tracker == "tensorboard":
        assert set(found.times.values()) == {1}  # of rounds that were lost it shows nothing
    if tracker in ("wandb", "mlflow"):
        assert found.status in ("0", "FINISHED")


def test_offline_is_the_default_without_an_account_and_said(small_run, tmp_path: Path, at_home: Path, capsys) -> None:
    pytest.importorskip("wandb")
    trained(small_run(tmp_path / "run", trackers=("wandb",)))
    assert f"there is no API key, so the run is kept in {tmp_path / 'run/wandb'}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "compare", "sweep"])
def test_a_missing_library_is_a_sentence_before_anything_is_begun(
    tmp_path: Path, monkeypatch, capsys, command: str
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(named, "find_spec", lambda name: None if name == "wandb" else there(name))
    assert main([command, "--trackers", "wandb", "--output", str(tmp_path / "run")]) == 2
    assert "pip install 'fedsim[wandb]'" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


OWN = """
from fedsim.errors import InvalidInput
from server.callbacks import Callback

class Counts(Callback):
    told = []
    def on_begin(self, run):
        self.told.append(run)
    def on_record(self, record):
        self.told.append(record["round"])
    def on_end(self, summary):
        self.told.append(summary["rounds"])

class NeedsMore(Callback):
    def __init__(self, place):
        self.place = place

class Unrelated:
    pass
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "watching_of_my_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "watching_of_my_own"


def test_a_class_of_ones_own_is_named_and_told_where_a_run_goes_on(
    small_run, tmp_path: Path, monkeypatch, own_module: str
) -> None:
    folder = tmp_path / "run"
    again = crashed(small_run(folder, callbacks=(f"{own_module}:Counts",)), monkeypatch)
    trained(again)
    told = importlib.import_module(own_module).Counts.told
    first, second = (one for one in told if not isinstance(one, int))
    assert (first.resumed_at, second.resumed_at) == (None, 4)
    assert first.folder == str(folder)
    assert first.plan["noise_multiplier"] == 1.0
    assert first.config["plan.rounds"] == ROUNDS
    assert not {"sampling-seed", "noise-seed"} & set(first.config)
    assert [one for one in told if isinstance(one, int)] == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, ROUNDS]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Counts", "of the form module:Class"),
        ("watching_of_my_own:", "of the form module:Class"),
        ("no_such_module:Counts", "of a module that can be imported"),
        ("watching_of_my_own:Absent", "watching_of_my_own has no Absent"),
        ("watching_of_my_own:Unrelated", "Derive it from fedsim.Callback"),
        ("watching_of_my_own:NeedsMore", "called without arguments"),
    ],
)
def test_a_name_that_stands_for_no_callback_is_refused_with_nothing_begun(
    own_module: str, tmp_path: Path, capsys, name: str, words: str
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["train", "--callbacks", name, "--output", str(folder)]))
    assert ended.value.code == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not folder.exists()


def test_a_tracker_that_nobody_knows_is_refused(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["train", "--trackers", "neptune"]))
    assert ended.value.code == 2
    with pytest.raises(InvalidInput, match="trackers"):
        from_flat(RunConfig, {"trackers": '["neptune"]'})
