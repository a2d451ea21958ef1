"""Every preset is valid for every command that takes one."""

import json
from pathlib import Path

import pytest

from experiments.compare import Compare
from experiments.plan.command import PlanCommand
from experiments.presets import FOLDER, load_preset, preset_names
from experiments.run import main
from experiments.sweep.command import Sweep
from experiments.sweep.points import points_of
from experiments.train import Train
from fedsim.errors import InvalidInput

PATH = ["--data.path", "corpus.parquet"]
"""Presets whose text is in files ask for it."""


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("kind", [Compare, Train, Sweep, PlanCommand])
def test_presets_are_valid(name: str, kind: type) -> None:
    assert isinstance(load_preset(kind, name, PATH), kind)


@pytest.mark.parametrize("name", preset_names())
def test_every_point_of_a_presets_sweep_is_valid(name: str, tmp_path) -> None:
    sweep = load_preset(Sweep, name, PATH)
    points = points_of(sweep.sweep, sweep)
    assert len({point.name for point in points}) == len(points)
    for point in points:
        point.config(sweep.common(), tmp_path)


def test_a_preset_sets_what_it_says() -> None:
    preset = load_preset(Sweep, "shakespeare", PATH)
    assert preset.plan.rounds == 12
    assert preset.sweep.epsilons == (2, 8, 32)
    assert load_preset(PlanCommand, "shakespeare", PATH).plan.rounds == 12
    assert load_preset(Compare, "paper-350m-stackoverflow").els.group_size == 16


def test_an_unknown_section_is_refused(tmp_path) -> None:
    (tmp_path / "mine.toml").write_text("[planner]\nepsilon = 1\n", encoding="utf-8")
    with pytest.raises(InvalidInput, match="planner"):
        load_preset(Train, str(tmp_path / "mine.toml"))


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("command", ["train", "compare", "sweep", "plan"])
def test_a_preset_from_a_clone_begins_or_says_what_it_lacks(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Without any file but the package's own; what a hub is asked for is not tried here."""
    monkeypatch.chdir(tmp_path)
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    assert "../" not in text
    if "corpus = " not in text:
        assert load_preset(Train, name).data.source in ("docstrings", "hub")
        return
    assert main([command, "--preset", name]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: data.path is None; it must be given with --preset {name}. It is for ")
    assert "https://" in said
    assert not list(tmp_path.iterdir())


def test_a_preset_runs_on_the_files_that_it_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = (
        json.dumps({"user_id": f"role {n % 40}", "text": f"A speech, number {n}, of the play."}) for n in range(200)
    )
    (tmp_path / "speeches.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tiny = ["--model.small.layers", "1", "--model.small.width", "16", "--model.small.heads", "2", "--plan.rounds", "2"]
    tiny += ["--model.small.vocabulary-size", "300", "--model.small.steps", "0", "--plan.gradients-per-round", "16"]
    local = ["--engine.kind", "local", "--engine.workers", "1", "--output", "out", "--plan.delta", "1e-3"]
    command = ["train", "--preset", "shakespeare", "--data.path", "speeches.jsonl"]
    assert main([*command, *tiny, *local]) == 0
    assert (tmp_path / "out/privacy.json").is_file()
