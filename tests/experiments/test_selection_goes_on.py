"""A private selection that was interrupted, or whose runs died: no run is drawn anew."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from mock_selection import COMMON, Trained, opened, select

import experiments.selection.command as command
import experiments.selection.release as release
import experiments.sweep.run
from experiments.selection.budget import SelectionBudget
from experiments.selection.runs import PRIVATE
from experiments.sweep.points import Point
from experiments.sweep.run import Finished
from fedsim.config import EngineConfig, NoiseConfig
from fedsim.errors import Failure, InvalidInput


def test_a_run_that_was_begun_is_done_again_from_the_same_secret_seeds(
    trained: Trained, budget: SelectionBudget, tmp_path: Path
) -> None:
    trained.interrupted = {"run-0001"}
    with pytest.raises(KeyboardInterrupt):
        select(tmp_path, budget)
    kept = tmp_path / PRIVATE / "seeds" / "run-0001.json"
    assert kept.stat().st_mode & 0o077 == 0 == (tmp_path / PRIVATE).stat().st_mode & 0o077
    trained.interrupted = set()
    select(tmp_path, budget)
    first, again = trained.begun["run-0001"]
    assert first == again
    assert [len(begun) for begun in trained.begun.values()] == [1, 2, 1, 1]
    everyone = [seeds for begun in trained.begun.values() for seeds in begun[:1]]
    assert len({seeds.sampling for seeds in everyone} | {seeds.noise for seeds in everyone}) == 8
    assert min(seeds.sampling for seeds in everyone).bit_length() > 128, "nobody guesses them"
    assert not kept.parent.exists(), "whoever has them can take the noise off what is released"


@pytest.mark.parametrize(("changed", "name"), [("data", "data"), ("tokenizer", "tokenizer"), ("weights", "model")])
def test_a_selection_goes_on_with_the_same_data_and_model_alone(
    trained: Trained,
    budget: SelectionBudget,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: str,
    name: str,
) -> None:
    monkeypatch.setattr(release, "write_card_of", lambda *_: None)
    trained.interrupted = {"run-0002"}
    with pytest.raises(KeyboardInterrupt):
        select(tmp_path, budget, resources=opened())
    trained.interrupted = set()
    with pytest.raises(InvalidInput, match=f"differs in: {name}"):
        select(tmp_path, budget, resources=opened(**{changed: "another"}))
    select(tmp_path, budget, resources=opened())
    assert '"data"' not in (tmp_path / PRIVATE / "drawn.json").read_text(), "its fingerprint is of no use any more"
    select(tmp_path, budget, resources=opened())  # finished: only told again


def test_with_secure_noise_a_run_that_was_begun_and_not_finished_failed(
    trained: Trained, budget: SelectionBudget, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secure = dataclasses.replace(COMMON, noise=NoiseConfig(secure=True))
    trained.changes, trained.interrupted = {"run-0001": -0.9, "run-0003": 0.1}, {"run-0001"}
    with pytest.raises(KeyboardInterrupt):
        select(tmp_path, budget, secure)
    trained.interrupted = set()
    select(tmp_path, budget, secure)
    assert [len(begun) for begun in trained.begun.values()] == [1, 1, 1, 1]
    assert json.loads((tmp_path / "selected" / "model" / "config.json").read_text())["of"] == "run-0003"
    assert "begun and not finished" in capsys.readouterr().err


def test_a_run_whose_process_dies_failed_and_is_not_run_again(
    trained: Trained, budget: SelectionBudget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = str(tmp_path / "begun")

    def dies(point: Point, *_: Any) -> Finished:
        with open(begun, "a") as file:
            file.write(f"{point.name}\n")
        os._exit(1)

    monkeypatch.setattr(experiments.sweep.run, "_limited", dies)
    monkeypatch.setattr(command, "draw_runs", lambda *_: 2)
    common = dataclasses.replace(COMMON, engine=EngineConfig(kind="ray"))
    for _ in range(2):
        with pytest.raises(Failure, match="no run of the selection finished"):
            select(tmp_path / "s", budget, common)
        assert sorted(Path(begun).read_text().split()) == ["run-0000", "run-0001"]
