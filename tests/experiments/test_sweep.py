"""Sweeps: their points, resuming, failures, the choice of settings, and the report."""

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsim.engine.local
import fedsim.resources
import server.app
from experiments.prediction import predict
from experiments.report.sweep import cost_in_words, outcome
from experiments.run import main
from experiments.sweep.command import Sweep
from experiments.sweep.points import Point, SweepConfig, points_of
from experiments.sweep.results import cells_of, collect, cost_of_sweep, half_width, lead
from fedsim.config import EngineConfig, NoiseConfig, PlanConfig, RunConfig, to_flat
from fedsim.errors import InvalidInput
from fedsim.plan import UserSizes
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import PoissonSubsampledGaussian, Repeated
from fedsim.privacy.ledger import Ledger, LedgerDamaged
from server.run_folder import write_json

SMALL = [
    "--data.packages", "numpy",
    "--data.sequence-length", "32",
    "--model.small.layers", "1",
    "--model.small.width", "32",
    "--model.small.heads", "2",
    "--model.small.vocabulary-size", "512",
    "--model.small.steps", "5",
    "--plan.delta", "1e-3",
    "--plan.rounds", "2",
    "--evaluation.every", "2",
    "--evaluation.max-rows", "20",
    "--evaluation.test-rows", "20",
]  # fmt: skip


def point(**changes: Any) -> Point:
    values: dict[str, Any] = {
        "arm": "uls",
        "epsilon": 8.0,
        "gradients_per_round": 64,
        "group_size": 2,
        "learning_rate": 0.001,
        "clip_norm": 1.0,
        "seed": 0,
    }
    return Point(**(values | changes))


class FakeTraining:
    """Stands in for server.app.train: leaves a run folder in no time, and fails or is interrupted where told."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.failing: set[str] = set()
        self.interrupted: set[str] = set()

    def __call__(self, grid: Any, config: RunConfig) -> dict[str, Any]:
        folder = Path(str(config.output))
        name = folder.name.removesuffix(".partial")
        assert not (folder / "leftover").exists()
        if name in self.interrupted:
            (folder / "leftover").touch()
            raise KeyboardInterrupt
        if name in self.failing:
            raise ValueError("no luck")
        self.trained.append(name)
        seed = json.loads((folder / "point.json").read_text())["seed"]
        loss = 3.0 + 0.1 * (config.plan.algorithm == "els") + 0.01 * seed
        plan = config.plan.draft(UserSizes.of_quantiles(10_000, {0.5: 4}))
        if config.plan.noise_multiplier == 0:
            plan = dataclasses.replace(plan, noise_multiplier=0.0)
        write_json(folder / "config.json", {"config": to_flat(config), "plan": plan.to_values()})
        (folder / "metrics.jsonl").write_text(json.dumps({"loss": loss + 0.001 * config.plan.group_size}) + "\n")
        with Ledger.open(folder / "ledger.jsonl") as ledger:
            if plan.noise_multiplier > 0:
                ledger.charge(PoissonSubsampledGaussian(sampling_probability=0.1, noise_multiplier=2.0), round=0)
        summary = {
            "test_loss_before": 4.0,
            "test_loss_after": loss,
            "test_accuracy_after": 0.2,
            "epsilon": config.plan.epsilon if config.plan.epsilon < math.inf else None,
            "noise_multiplier": 1.0,
            "seconds": 0.1,
        }
        write_json(folder / "summary.json", summary)
        return summary


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    fake = FakeTraining()
    monkeypatch.setattr(server.app, "train", fake)
    monkeypatch.setattr(fedsim.engine.local, "LocalGrid", lambda *_, **__: None)
    monkeypatch.setattr(fedsim.resources, "open_resources", lambda *_, **__: None)
    monkeypatch.setattr(Sweep, "_predict", lambda *_: {})
    return fake


def small_sweep(output: Path, **changes: Any) -> Sweep:
    values: dict[str, Any] = {
        "sweep": SweepConfig(epsilons=(2.0, 8.0), uls_group_sizes=(1, 2), els_group_sizes=(4,), seeds=2),
        "engine": EngineConfig(kind="local"),
        "output": str(output),
    }
    return Sweep(**(values | changes))


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


def test_a_folder_of_other_settings_is_refused_and_a_larger_grid_is_not(
    training: FakeTraining, tmp_path: Path
) -> None:
    assert small_sweep(tmp_path).run() == 0
    with pytest.raises(InvalidInput, match=r"plan\.rounds"):
        small_sweep(tmp_path, plan=PlanConfig(rounds=99)).run()
    larger = SweepConfig(epsilons=(2.0, 4.0, 8.0), uls_group_sizes=(1, 2), els_group_sizes=(4,), seeds=2)
    assert small_sweep(tmp_path, sweep=larger).run() == 0
    assert len(training.trained) == 14 + 6


def test_a_value_that_is_not_allowed_is_found_before_anything_runs(training: FakeTraining, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="epsilon"):
        small_sweep(tmp_path, sweep=SweepConfig(epsilons=(2.0, -1.0))).run()
    assert not training.trained


def row(arm: str, group: int, seed: int, validation: float, test: float) -> dict[str, Any]:
    return {
        "arm": arm,
        "epsilon": 8.0,
        "gradients_per_round": 64,
        "group_size": group,
        "learning_rate": 0.001,
        "clip_norm": 1.0,
        "seed": seed,
        "validation_loss": validation,
        "test_loss": test,
    }


def test_settings_are_chosen_on_validation_users_and_reported_on_test_users() -> None:
    rows = [row("uls", 1, seed, 3.0, 3.5 + 0.1 * seed) for seed in range(3)]
    rows += [row("uls", 2, seed, 3.1, 3.2) for seed in range(3)]
    rows += [row("uls", 4, 0, 2.0, 2.0)]
    (cell,) = cells_of(rows)
    assert cell["best"]["group_size"] == 1, "4 has the least validation loss, but of one seed only"
    assert cell["best"]["loss"] == pytest.approx(3.6)
    assert cell["best"]["half_width"] == pytest.approx(4.3027 * 0.1 / np.sqrt(3), rel=1e-3)
    assert len(cell["settings"]) == 3


def test_intervals_need_two_seeds_and_cover() -> None:
    assert half_width(np.array([1.0])) is None
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(4000, 3))
    covered = np.mean([abs(values.mean()) <= half_width(values) for values in draws])
    assert covered == pytest.approx(0.95, abs=0.012)
    first, second = {"losses": {0: 3.0, 1: 3.2}}, {"losses": {0: 3.5, 1: 3.7}}
    assert lead(first, second)[0] == pytest.approx(0.5)
    assert lead(first, {"losses": {0: 3.5}}) == (pytest.approx(0.4), None)


def users(sizes: list[int]) -> Any:
    class View:
        num_users = len(sizes)
        num_rows = sum(sizes)
        user_offsets = np.concatenate([[0], np.cumsum(sizes)])

    return View()


def test_prediction_beside_outcome() -> None:
    config = RunConfig(plan=PlanConfig(epsilon=1.0, delta=1e-4, gradients_per_round=256, rounds=50))
    prediction = predict(config, users([8] * 1000), {"uls": [1, 8], "els": 8})
    assert prediction.private_statistics
    assert [found.curve.name for found in prediction.arms] == ["aligned", "orthogonal"]
    assert prediction.arms[0].plans["uls"].group_size == 1
    assert prediction.arms[1].plans["uls"].group_size == 8
    assert prediction.arms[1].winner == "uls"
    assert len(json.loads(json.dumps(prediction.to_json()))["in_words"]) == 4
    fixed = predict(config, users([8] * 1000), {"uls": 1, "els": 8}).in_words()
    assert fixed[0].startswith("With the group sizes of this run. However alike")
    assert len(fixed) == 3  # with one example of each user it makes no difference how alike a user's gradients are

    rows = [
        row(arm, 8, seed, loss, loss + 0.001 * seed) | {"epsilon": 1.0, "gradients_per_round": 256}
        for arm, loss in (("uls", 3.5), ("els", 3.0))
        for seed in range(3)
    ]
    found = outcome(cells_of(rows), (1.0, 256), prediction)
    assert found is not None
    assert found["observed_winner"] == "els"
    assert found["agrees"] is False
    assert outcome(cells_of(rows[:3]), (1.0, 256), prediction) is None


def seeds_of(points: list[Point], common: RunConfig, folder: Path) -> dict[str, tuple[int | None, int | None]]:
    configs = {point.name: point.config(common, folder / point.name) for point in points}
    return {name: (run.sampling_seed, run.noise_seed) for name, run in configs.items()}


def test_no_two_points_share_a_seed_and_each_keeps_its_own_when_the_sweep_grows(tmp_path: Path) -> None:
    small = SweepConfig(epsilons=(2.0, 8.0), seeds=2)
    large = SweepConfig(
        epsilons=(1.0, 2.0, 8.0),
        compute=(64, RunConfig().plan.gradients_per_round),
        uls_group_sizes=(1, 2),
        els_group_sizes=(4, 8),
        learning_rates=(1e-4, RunConfig().optimizer.learning_rate),
        clip_norms=(0.5, RunConfig().plan.clip_norm),
        seeds=3,
    )
    some = seeds_of(points_of(small, RunConfig()), RunConfig(), tmp_path)
    all_ = seeds_of(points_of(large, RunConfig()), RunConfig(), tmp_path / "elsewhere")
    assert some.items() <= all_.items()
    drawn = list(itertools.chain.from_iterable(all_.values()))
    assert len(set(drawn)) == 2 * len(all_) == 2 * len(points_of(large, RunConfig()))
    assert all(0 <= seed < 2**62 for seed in drawn)
    elsewhere = RunConfig(engine=EngineConfig(workers=7))
    assert seeds_of(points_of(small, elsewhere), elsewhere, tmp_path) == some, "where it is computed decides nothing"
    for other in (RunConfig(sampling_seed=1, noise_seed=1), RunConfig(plan=PlanConfig(rounds=3))):
        assert not set(itertools.chain(*seeds_of(points_of(small, other), other, tmp_path).values())) & set(drawn)


def test_secure_noise_of_a_point_has_no_seed(tmp_path: Path) -> None:
    common = RunConfig(noise=NoiseConfig(secure=True))
    run = point().config(common, tmp_path)
    assert run.noise_seed is None
    assert run.sampling_seed == point().config(common, tmp_path / "again").sampling_seed is not None


def test_the_cost_of_a_sweep_is_that_of_all_its_private_points_and_says_what_it_leaves_out(
    training: FakeTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_sweep(tmp_path).run()
    cost = cost_of_sweep(tmp_path, collect(tmp_path))
    assert cost is not None
    step = PoissonSubsampledGaussian(sampling_probability=0.1, noise_multiplier=2.0)
    assert cost.epsilon is not None
    assert cost.epsilon.upper == pytest.approx(epsilon_bounds(Repeated(event=step, count=12), 1e-5).upper, rel=0.01)
    words = cost_in_words(cost, free=2)
    for said in (
        "12 private points", f"models of these 12 points together are {cost.guarantee}", "2 points were trained",
        "ε = ∞", "has no finite ε for the choice", "validation users", "measured without noise",
        "none of their models may be released",
    ):  # fmt: skip
        assert said in words
    results = json.loads((tmp_path / "results.json").read_text())["privacy_cost"]
    assert results["in_words"] == words
    assert (results["private_points"], results["points_without_privacy"]) == (12, 2)
    assert words in capsys.readouterr().out
    for name in ("report.md", "report.html"):
        assert words in (tmp_path / name).read_text(encoding="utf-8")
    assert "without privacy" not in cost_in_words(cost, free=0)
    assert "private points" not in cost_in_words(None, free=2)


def test_points_of_an_earlier_grid_in_the_folder_count(training: FakeTraining, tmp_path: Path) -> None:
    small_sweep(tmp_path).run()
    smaller = SweepConfig(epsilons=(2.0,), uls_group_sizes=(1,), els_group_sizes=(4,), seeds=1)
    assert small_sweep(tmp_path, sweep=smaller).run() == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["points"]) == 3
    assert results["privacy_cost"]["private_points"] == 12


@pytest.mark.parametrize("kind", ["sampling", "noise"])
def test_points_that_share_a_seed_are_not_composed(training: FakeTraining, tmp_path: Path, kind: str) -> None:
    """As the points of version 0.1 did: all with the same number had the same seeds."""
    small_sweep(tmp_path).run()
    for path in tmp_path.glob("*/config.json"):
        written = json.loads(path.read_text())
        written["config"][f"{kind}-seed"] = json.loads((path.parent / "point.json").read_text())["seed"]
        write_json(path, written)
    assert small_sweep(tmp_path).run() == 0
    results = json.loads((tmp_path / "results.json").read_text())["privacy_cost"]
    assert results["epsilon"] is None
    assert f"share their {kind} seeds" in results["unclaimed"]
    assert "is not stated" in results["in_words"]
    assert "together are" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_no_cost_is_claimed_from_a_ledger_that_was_changed(training: FakeTraining, tmp_path: Path) -> None:
    small_sweep(tmp_path).run()
    (private, *_) = [row for row in collect(tmp_path) if row["arm"] == "uls"]
    path = tmp_path / private["point"] / "ledger.jsonl"
    path.write_text(path.read_text().replace('"noise_multiplier": 2.0', '"noise_multiplier": 9.0'))
    with pytest.raises(LedgerDamaged):
        cost_of_sweep(tmp_path, [private])


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
    assert results["planner"][0]["predicted_winner"] in {"uls", "els", "level"}
    assert not list(tmp_path.glob("*/model"))
