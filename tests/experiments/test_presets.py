"""Every preset is valid for every command that takes one."""

import pytest

from experiments.compare import Compare
from experiments.plan.command import PlanCommand
from experiments.presets import load_preset, preset_names
from experiments.sweep.command import Sweep
from experiments.sweep.points import points_of
from experiments.train import Train
from fedsim.errors import InvalidInput


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("kind", [Compare, Train, Sweep, PlanCommand])
def test_presets_are_valid(name: str, kind: type) -> None:
    assert isinstance(load_preset(kind, name), kind)


@pytest.mark.parametrize("name", preset_names())
def test_every_point_of_a_presets_sweep_is_valid(name: str, tmp_path) -> None:
    sweep = load_preset(Sweep, name)
    points = points_of(sweep.sweep, sweep)
    assert len({point.name for point in points}) == len(points)
    for point in points:
        point.config(sweep.common(), tmp_path)


def test_a_preset_sets_what_it_says() -> None:
    preset = load_preset(Sweep, "shakespeare")
    assert preset.plan.rounds == 12
    assert preset.sweep.epsilons == (2, 8, 32)
    assert load_preset(PlanCommand, "shakespeare").plan.rounds == 12
    assert load_preset(Compare, "paper-350m-stackoverflow").els.group_size == 16


def test_an_unknown_section_is_refused(tmp_path) -> None:
    (tmp_path / "mine.toml").write_text("[planner]\nepsilon = 1\n", encoding="utf-8")
    with pytest.raises(InvalidInput, match="planner"):
        load_preset(Train, str(tmp_path / "mine.toml"))
