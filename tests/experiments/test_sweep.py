"""Sweeps: their points, resuming, failures, and what they cost."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mock_sweep import FakeTraining, point, row, small_sweep
from small_flags import TINY

import server.app
from experiments.run import main
from experiments.sweep.points import Point, SweepConfig, points_of
from experiments.sweep.results import cells_of
from fedsim.config import EvaluationConfig, OptimizerConfig, PlanConfig, RunConfig
from fedsim.errors import InvalidInput
from server.precautions.stopping import Stopped

SMALL = [*TINY, "--evaluation.every", "2"]


def test_points_are_all_combinations_seed_by_seed() -> None:
    sweep = SweepConfig(
        epsilons=(1.0, 2.0),
        compute=(64, 128),
        uls_group_sizes=(1, 2),
        els_group_sizes=(4,),
        learning_rates=(1e-3, 1e-2),
    )
    points = points_of(sweep, RunConfig())
    assert len(points) == 3 * (2 * 2 * 2 * (2 + 1) + 2 * 2)
    assert len({p.name for p in points}) == len(points)
    assert [p.seed for p in points] == sorted(p.seed for p in points)
    assert {p.clip_norm for p in points if p.arm == "uls"} == {RunConfig().plan.clip_norm}


def test_averages_are_an_axis_and_each_point_is_a_run_with_its_own(tmp_path: Path) -> None:
    common = RunConfig(optimizer=OptimizerConfig(average="exponential", average_decay=0.9))
    points = points_of(SweepConfig(seeds=1, averages=("none", "exponential", "tail")), common)
    assert len({p.name for p in points}) == len(points) == 3 * 3
    runs = {p: p.config(common, tmp_path) for p in points}
    assert {run.optimizer.average for run in runs.values()} == {"none", "exponential", "tail"}
    assert all(run.optimizer.average == p.average for p, run in runs.items())
    assert {run.optimizer.average_decay for p, run in runs.items() if p.average == "exponential"} == {0.9}
    assert len({run.noise_seed for run in runs.values()}) == len(runs)
    # Without the axis points have the run's own; a point written before there were averages has none.
    assert {p.average for p in points_of(SweepConfig(seeds=1), common)} == {"exponential"}
    written = {name: value for name, value in point().to_json().items() if name != "average"}
    assert Point.from_json(written) == point()
    assert "none" not in point().name


def test_averages_are_tried_apart_and_named_in_the_tables(training: FakeTraining, tmp_path: Path) -> None:
    rows = [row("uls", 1, seed, 3.1, 3.5) for seed in (0, 1)]
    rows += [row("uls", 1, seed, 3.0, 3.5, average="tail") for seed in (0, 1)]
    (cell,) = cells_of(rows)
    assert [(setting["average"], setting["seeds"]) for setting in cell["settings"]] == [("none", 2), ("tail", 2)]
    assert cell["best"]["average"] == "tail"
    sweep = SweepConfig(epsilons=(2.0,), seeds=1)
    assert small_sweep(tmp_path, sweep=sweep, optimizer=OptimizerConfig(average="exponential")).run() == 0
    assert "| exponential |" in (tmp_path / "report.md").read_text()
    assert small_sweep(tmp_path, sweep=dataclasses.replace(sweep, averages=("none", "exponential"))).run() == 0
    assert len(training.trained) == 3 + 3


def test_a_point_is_a_run_with_its_own_seeds_and_without_privacy_only_where_it_says_so(tmp_path: Path) -> None:
    run = point(seed=7).config(RunConfig(), tmp_path)
    assert (run.engine.kind, run.plan.noise_multiplier) == ("local", None)
    assert None not in (run.sampling_seed, run.noise_seed)
    assert not run.plan.allow_no_privacy
    free = point(arm="nonprivate", epsilon=math.inf, clip_norm=1e6).config(RunConfig(), tmp_path)
    assert free.plan.noise_multiplier == 0
    assert Point.from_json(json.loads(json.dumps(point(epsilon=math.inf).to_json()))) == point(epsilon=math.inf)


def test_a_finished_sweep_is_not_run_again(training: FakeTraining, tmp_path: Path) -> None:
    assert small_sweep(tmp_path).run() == 0
    assert len(training.trained) == len(set(training.trained)) == 2 * (2 * 3 + 1)
    assert small_sweep(tmp_path).run() == 0
    assert len(training.trained) == 14
    assert (tmp_path / "report.html").read_text().count("<figure>") == 3
    results = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "report.md").read_text().count("| ULS | 8 | 256 |") == 1
    assert len(results["points"]) == 14
    assert results["privacy_cost"]["epsilon"] > 0.5


def test_points_in_this_process_draw_their_own_progress_undisturbed(
    training: FakeTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, that is a terminal
    assert small_sweep(tmp_path).run() == 0
    shown = capsys.readouterr()
    assert shown.out.count("Loss on held-out users") == 1
    assert shown.err.splitlines() == [f"{name}:" for name in training.trained]


def test_a_failing_point_loses_no_other_and_is_tried_again(training: FakeTraining, tmp_path: Path) -> None:
    training.failing = {point(epsilon=2.0, gradients_per_round=256, group_size=1).name}
    assert small_sweep(tmp_path).run() == 1
    assert len(training.trained) == 13
    name = training.failing.pop()
    assert "no luck" in (tmp_path / "failures" / f"{name}.txt").read_text()
    assert "no luck" in (tmp_path / "report.html").read_text()
    assert small_sweep(tmp_path).run() == 0
    assert training.trained[13:] == [name]
    assert not (tmp_path / "failures" / f"{name}.txt").exists()


def test_an_interrupted_sweep_goes_on_where_it_stopped(training: FakeTraining, tmp_path: Path) -> None:
    training.interrupted = {point(epsilon=8.0, gradients_per_round=256, group_size=1).name}
    with pytest.raises(KeyboardInterrupt):
        small_sweep(tmp_path).run()
    before = list(training.trained)
    assert 0 < len(before) < 14
    assert len(list(tmp_path.glob("*.partial"))) == 1
    training.interrupted = set()
    assert small_sweep(tmp_path).run() == 0
    assert len(training.trained) == len(set(training.trained)) == 14
    assert not list(tmp_path.glob("*.partial"))


def test_a_sweep_that_is_asked_to_stop_begins_no_other_point(
    training: FakeTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(grid: Any, config: RunConfig, **_: Any) -> None:
        raise Stopped(signal.SIGTERM, 1, str(config.output))

    monkeypatch.setattr(server.app, "train", stopped)
    assert small_sweep(tmp_path).run() == 128 + signal.SIGTERM
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    assert f"go on with the same command and --output {tmp_path}" in said
    assert not (tmp_path / "failures").exists()
    monkeypatch.setattr(server.app, "train", training)
    assert small_sweep(tmp_path).run() == 0
    assert len(training.trained) == 14


def test_a_folder_of_other_settings_is_refused_and_a_larger_grid_is_not(
    training: FakeTraining, tmp_path: Path
) -> None:
    assert small_sweep(tmp_path).run() == 0
    with pytest.raises(InvalidInput, match=r"plan\.rounds"):
        small_sweep(tmp_path, plan=PlanConfig(rounds=99)).run()
    larger = SweepConfig(epsilons=(2.0, 4.0, 8.0), uls_group_sizes=(1, 2), els_group_sizes=(4,), seeds=2)
    assert small_sweep(tmp_path, sweep=larger).run() == 0
    assert len(training.trained) == 14 + 6
    claim = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
    del claim["common"]["optimizer.momentum"]  # as of a version that lacked the option
    (tmp_path / "sweep.json").write_text(json.dumps(claim), encoding="utf-8")
    with pytest.raises(InvalidInput, match=r"optimizer\.momentum"):
        small_sweep(tmp_path, sweep=larger, optimizer=OptimizerConfig(momentum=0.8)).run()
    assert small_sweep(tmp_path, sweep=larger).run() == 0


def test_only_the_best_of_each_arm_is_repeated_where_that_is_asked_for(training: FakeTraining, tmp_path: Path) -> None:
    asked = SweepConfig(
        epsilons=(2.0, 8.0), uls_group_sizes=(2, 1, 4), els_group_sizes=(4,), bands=("1", "2"), seeds=3, repeat="best"
    )
    training.failing = {"uls-B256-eps2-G1-C1-lr0.001-seed0"}
    assert small_sweep(tmp_path, sweep=asked).run() == 1
    once = [name for name in training.trained if name.endswith("seed0")]
    again = [name for name in training.trained if not name.endswith("seed0")]
    assert training.trained == once + again
    assert len(once) == 2 * 2 * (3 + 1) + 1 - 1  # without privacy there is one; one failed, and is not tried twice
    assert len(again) == 2 * (2 * 2 * (1 + 1) + 1)
    uls = {name.rsplit("-", 1)[0] for name in again if name.startswith("uls")}
    assert {name for name in uls if "eps8" in name} == {
        "uls-B256-eps8-G1-C1-lr0.001", "uls-B256-eps8-G1-C1-bands-2-lr0.001"
    }  # fmt: skip
    assert "uls-B256-eps2-G2-C1-lr0.001" in uls, "the best of those that did not fail"
    training.failing = set()
    training.trained.clear()
    assert small_sweep(tmp_path, sweep=asked).run() == 0
    assert training.trained[0] == "uls-B256-eps2-G1-C1-lr0.001-seed0"
    assert len(training.trained) == 1 + 2, "it is the best, now that it ran"
    cost = json.loads(next(tmp_path.rglob("results.json")).read_text(encoding="utf-8"))["privacy_cost"]
    assert cost["epsilon"] is None
    assert "results decided which of several group sizes" in cost["in_words"]
    one = dataclasses.replace(asked, uls_group_sizes=(2,), learning_rates=(1e-3, 1e-2))
    assert small_sweep(tmp_path / "rates", sweep=one).run() == 0
    cost = json.loads(next((tmp_path / "rates").rglob("results.json")).read_text(encoding="utf-8"))["privacy_cost"]
    assert cost["private_points"] == 2 * 2 * (2 + 2) + 2 * 2 * (2 + 2)
    assert cost["unclaimed"] is None, "whatever rate is chosen, it releases the same"


def test_private_evaluations_need_losses_to_compare_and_arms_that_have_noise(
    training: FakeTraining, tmp_path: Path
) -> None:
    private = EvaluationConfig(private=True)
    with pytest.raises(InvalidInput, match=r"sweep\.no-nonprivate"):
        small_sweep(tmp_path, evaluation=private).run()
    noisy = SweepConfig(epsilons=(8.0,), seeds=1, nonprivate=False)
    with pytest.raises(InvalidInput, match="select private"):
        small_sweep(tmp_path, evaluation=private, sweep=noisy, training_metrics="off").run()
    assert not training.trained
    assert small_sweep(tmp_path, evaluation=private, sweep=noisy).run() == 0


def test_a_value_that_is_not_allowed_is_found_before_anything_runs(training: FakeTraining, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="epsilon"):
        small_sweep(tmp_path, sweep=SweepConfig(epsilons=(2.0, -1.0))).run()
    assert not training.trained


def test_sigterm_to_a_sweep_on_ray_says_how_to_go_on(tmp_path: Path) -> None:
    arguments = ["sweep", *SMALL, "--plan.gradients-per-round", "16", "--sweep.epsilons", "50", "--sweep.seeds", "2"]
    arguments += ["--sweep.uls-group-sizes", "1", "--sweep.els-group-sizes", "2", "--sweep.slots", "1"]
    arguments += ["--plan.rounds", "500", "--output", str(tmp_path)]
    program = subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("*.partial/ledger.jsonl")) and time.monotonic() < deadline:
        assert program.poll() is None
        time.sleep(0.1)
    program.send_signal(signal.SIGTERM)
    _, said = program.communicate(timeout=200)
    assert program.returncode == 128 + signal.SIGTERM, said
    assert f"go on with the same command and --output {tmp_path}: points that are finished are not run again" in said
    assert "terminated" in said
    assert "SIGTERM received" not in said, "Ray's own answer, with a stack trace"
    assert "Traceback" not in said


def finished_points(folder: Path) -> dict[Path, int]:
    """The summaries of points that are in their final place, and when each was written."""
    done = [path for path in folder.glob("*/summary.json") if "partial" not in path.parent.name]
    return {path: path.stat().st_mtime_ns for path in done}


def test_killed_and_resumed_for_real(tmp_path: Path) -> None:
    """Points as Ray tasks of a small model; the sweep is killed, with everything it started, and run again."""
    arguments = ["sweep", *SMALL, "--plan.gradients-per-round", "16", "--sweep.epsilons", "50", "--sweep.seeds", "3"]
    arguments += ["--sweep.uls-group-sizes", "1", "--sweep.els-group-sizes", "2", "--sweep.slots", "1"]
    arguments += ["--output", str(tmp_path)]
    first = subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *arguments], start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not finished_points(tmp_path) and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    finished = finished_points(tmp_path)
    assert 0 < len(finished) < 9

    assert main([*arguments, "--engine.kind", "local"]) == 0
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["points"]) == 9
    assert (results["privacy_cost"]["private_points"], results["privacy_cost"]["unclaimed"]) == (6, None)
    assert results["privacy_cost"]["epsilon"] > 50
    assert results["planner"][0]["predicted_winner"] in {"uls", "els", "level"}
    assert not list(tmp_path.glob("*/model"))
