"""What a sweep's terminal and records show: columns that tell something apart, and the arm without privacy."""

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from mock_sweep import FakeTraining, point, small_sweep
from rich.console import Console

from experiments.report.arms.arm import label
from experiments.report.run import format_value
from experiments.sweep.command import best_settings
from experiments.sweep.points import Point, SweepConfig
from experiments.sweep.results import collect
from fedsim.plan import ALL_EXAMPLES


def shown(folder: Path) -> str:
    """The table of a finished sweep in a terminal of 80 columns."""
    console = Console(file=io.StringIO(), width=80)
    console.print(best_settings(collect(folder)))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_the_table_leaves_out_what_tells_nothing_apart_and_cuts_no_heading(
    training: FakeTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = SweepConfig(epsilons=(2.0, 8.0), compute=(1024, 4096), learning_rates=(0.00025, 0.001), seeds=1)
    assert small_sweep(tmp_path / "one", sweep=sweep).run() == 0
    table = shown(tmp_path / "one")
    assert "…" not in table
    assert "no privacy" in table
    assert not [name for name in ("bands", "average", "seeds", "±") if name in table]
    assert [name for name in ("learning", "clip", "test") if name in table] == ["learning", "clip", "test"]
    several = dataclasses.replace(
        sweep, epsilons=(2.0,), compute=(), seeds=2, learning_rates=(), averages=("none", "tail"), bands=("1", "2")
    )
    assert small_sweep(tmp_path / "two", sweep=several).run() == 0
    wide = shown(tmp_path / "two")
    assert [name for name in ("bands", "average", "±") if name not in wide] == []
    assert "seeds" not in wide
    assert "…" not in wide
    assert capsys.readouterr().out.count("Loss on held-out users") == 2, "once a sweep"


def test_a_table_without_a_row_is_not_shown(
    training: FakeTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training.failing = {point(gradients_per_round=256, group_size=1).name}
    only = SweepConfig(algorithms=("uls",), seeds=1, nonprivate=False)
    with pytest.raises(Exception, match="No point finished"):
        small_sweep(tmp_path, sweep=only).run()
    assert "Loss on held-out users" not in capsys.readouterr().out


def test_without_privacy_no_group_size_is_told(training: FakeTraining, tmp_path: Path) -> None:
    assert small_sweep(tmp_path).run() == 0
    free = point(arm="nonprivate", epsilon=math.inf, group_size=ALL_EXAMPLES)
    assert free.to_json()["group_size"] is None
    assert Point.from_json(json.loads(json.dumps(free.to_json()))) == free
    for path in (*tmp_path.glob("*/point.json"), *tmp_path.glob("*.json"), *tmp_path.glob("report.*")):
        assert str(ALL_EXAMPLES) not in path.read_text(encoding="utf-8"), path
    summary: dict[str, Any] = {"algorithm": "els", "epsilon": None, "group_size": ALL_EXAMPLES}
    assert label(summary) == "no privacy"
    assert label(summary | {"group_size": 4}) == "ELS without privacy"
    assert format_value("group_size", ALL_EXAMPLES) == "all"
