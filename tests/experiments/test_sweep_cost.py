"""What a sweep cost in privacy: its points are independent, and what is said of them together is true."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from mock_sweep import FakeTraining, point, small_sweep

from experiments.report.sweep import cost_in_words
from experiments.sweep.points import Point, SweepConfig, points_of
from experiments.sweep.results import collect, cost_of_sweep
from fedsim.config import EngineConfig, NoiseConfig, PlanConfig, RunConfig
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import PoissonSubsampledGaussian, Repeated
from fedsim.privacy.ledger import LedgerDamaged
from server.results.run_folder import write_json


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


def test_an_option_that_a_later_version_adds_changes_no_seed(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Later(RunConfig):
        added: int = 0

    points = points_of(SweepConfig(epsilons=(2.0, 8.0), seeds=2), RunConfig())
    assert seeds_of(points, Later(), tmp_path) == seeds_of(points, RunConfig(), tmp_path)
    assert not set(seeds_of(points, Later(added=1), tmp_path).values()) & set(
        seeds_of(points, RunConfig(), tmp_path).values()
    )


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
    assert f"each share the {kind} seed of another" in results["unclaimed"]
    assert "is not stated" in results["in_words"]
    assert "together are" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_no_cost_is_claimed_from_a_ledger_that_was_changed(training: FakeTraining, tmp_path: Path) -> None:
    small_sweep(tmp_path).run()
    (private, *_) = [row for row in collect(tmp_path) if row["arm"] == "uls"]
    path = tmp_path / private["point"] / "ledger.jsonl"
    path.write_text(path.read_text().replace('"noise_multiplier": 2.0', '"noise_multiplier": 9.0'))
    with pytest.raises(LedgerDamaged):
        cost_of_sweep(tmp_path, [private])
