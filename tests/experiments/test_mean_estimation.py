"""Mean estimation: exact moments, and a closed form that agrees with simulation and only with the right one."""

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments import run
from experiments.mean_estimation.command import MeanEstimation
from experiments.mean_estimation.error import Population, mean_squared_error, unit_moments
from experiments.mean_estimation.moments import clipped_product, clipped_square, shrinkage
from experiments.mean_estimation.simulation import _draw_group, _poisson_sample, squared_errors
from experiments.mean_estimation.tuning import tuned
from fedsim.plan import ElsPlan, Plan, UlsPlan

SMALL = Population(num_users=20, examples_per_user=8, dimension=4, mean_norm=0.5)


def plan(algorithm: str, group_size: int, clip_norm: float, noise: float) -> Plan:
    common = {"group_size": group_size, "clip_norm": clip_norm, "noise_multiplier": noise, "steps": 10, "delta": 1e-5}
    if algorithm == "uls":
        return UlsPlan(num_users=20, sampling_probability=0.1, **common)
    return ElsPlan(num_examples=20 * group_size, sampling_probability=0.1, **common)


def clip(values: np.ndarray, norm: float) -> np.ndarray:
    return values * np.minimum(1, norm / np.linalg.norm(values, axis=1))[:, None]


@pytest.mark.parametrize(
    ("dimension", "center", "spread", "norm"),
    [(16, 1.0, 0.25, 1.0), (16, 1.0, 0.25, 0.3), (2, 1.0, 0.5, 1.0), (64, 0.01, 0.125, 1.0), (8, 0.0, 0.35, 0.9)],
)
def test_moments_of_clipped_gaussians(dimension: int, center: float, spread: float, norm: float) -> None:
    rng = np.random.default_rng(1)
    draws = 200_000
    common = 0.6 * spread * rng.standard_normal((draws, dimension))
    common[:, 0] += center
    first, second = (clip(common + 0.8 * spread * rng.standard_normal((draws, dimension)), norm) for _ in range(2))

    def close(samples: np.ndarray, expected: float) -> bool:
        return abs(samples.mean() - expected) < 4.5 * samples.std() / np.sqrt(draws) + 1e-9

    kappa = shrinkage(np.array([center]), spread, norm, dimension)[0]
    assert close(first[:, 0], kappa * center)
    assert close((first**2).sum(axis=1), clipped_square(center, spread, norm, dimension))
    product = clipped_product(center, 0.6 * spread, 0.8 * spread, norm, dimension)
    assert close((first * second).sum(axis=1), product)


def test_moments_without_spread_are_those_of_one_vector() -> None:
    assert shrinkage(np.array([2.0]), 0.0, 1.0, 4)[0] == pytest.approx(0.5)
    assert clipped_square(2.0, 0.0, 1.0, 4) == 1
    assert clipped_product(0.5, 0.3, 0.0, 100.0, 4) == pytest.approx(0.25 + 0.3**2 * 4)
    assert clipped_product(0.5, 0.0, 0.3, 100.0, 4) == pytest.approx(0.25)


@pytest.mark.parametrize("algorithm", ["uls", "els"])
@pytest.mark.parametrize("diversity", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("group_size", "clip_norm", "noise"), [(1, 0.8, 2.0), (4, 0.8, 0.0), (8, 100.0, 0.5)])
def test_closed_form_agrees_with_simulation(
    algorithm: str, diversity: float, group_size: int, clip_norm: float, noise: float
) -> None:
    population = replace(SMALL, diversity=diversity)
    chosen = plan(algorithm, group_size, clip_norm, noise)
    errors = squared_errors(population, chosen, 0.3, 6000, seed=3)
    expected = mean_squared_error(population, chosen, np.array([0.3]))[0]
    assert abs(errors.mean() - expected) < 4 * errors.std() / np.sqrt(len(errors))


def test_the_agreement_would_notice_a_wrong_plan() -> None:
    chosen = plan("uls", 4, 0.8, 0.0)
    errors = squared_errors(SMALL, chosen, 0.3, 6000, seed=3)
    for wrong in (replace(chosen, group_size=8), replace(chosen, clip_norm=1.0), plan("els", 4, 0.8, 0.0)):
        expected = mean_squared_error(SMALL, wrong, np.array([0.3]))[0]
        assert abs(errors.mean() - expected) > 5 * errors.std() / np.sqrt(len(errors))


def test_repetitions_are_reproducible_and_points_independent() -> None:
    chosen = plan("els", 4, 1.0, 1.0)
    first = squared_errors(SMALL, chosen, 0.3, 5, seed=3)
    assert (first == squared_errors(SMALL, chosen, 0.3, 5, seed=3)).all()
    assert (first != squared_errors(SMALL, chosen, 0.3, 5, seed=3, point=1)).all()


def test_poisson_samples_take_each_member_with_its_probability() -> None:
    rounds, members = _poisson_sample(3000, 50, 0.07, np.random.default_rng(0))
    assert len(set(zip(rounds.tolist(), members.tolist(), strict=True))) == len(rounds)
    counts = np.bincount(members, minlength=50)
    assert abs(counts - 210).max() < 4.5 * np.sqrt(210)
    assert np.bincount(rounds, minlength=3000).var() == pytest.approx(50 * 0.07 * 0.93, rel=0.15)


def test_groups_are_drawn_without_replacement() -> None:
    drawn = _draw_group(4000, 6, 3, np.random.default_rng(0))
    assert all(len(set(row)) == 3 for row in drawn.tolist())
    assert abs(np.bincount(drawn.ravel(), minlength=6) - 2000).max() < 4.5 * np.sqrt(2000)


def test_tuning_finds_the_least_error_over_plans_clips_and_rates() -> None:
    plans = [plan("uls", group, 1.0, 3.0) for group in (1, 4, 8)]
    best = tuned(SMALL, plans)
    for candidate in plans:
        for clip_norm in (0.3, 0.6, 1.0, 1.5):
            errors = mean_squared_error(SMALL, replace(candidate, clip_norm=clip_norm), np.array([0.05, 0.2, 0.5]))
            assert best.error <= errors.min() * 1.02


def test_group_sizes_beyond_what_users_own_change_nothing() -> None:
    assert unit_moments(SMALL, plan("uls", 8, 1.0, 0.0)) == unit_moments(SMALL, plan("uls", 80, 1.0, 0.0))


def test_diverse_users_favour_uls_at_large_compute_and_alike_users_els_at_the_same_group_size() -> None:
    study = MeanEstimation(compute=(16, 256), diversities=(0.0, 1.0), group_sizes=(1, 16), rounds=8)
    found = {(row["gradients_per_round"], row["diversity"]): row for row in study.error_map()}
    assert found[256, 1.0]["els"] > 1.25 * found[256, 1.0]["uls"]
    assert found[16, 0.0]["els_all"] < 0.5 * found[16, 0.0]["uls_all"]


def test_the_command_leaves_results_and_figures(tmp_path, capsys) -> None:
    arguments = ["mean-estimation", "--population.num-users", "60", "--population.examples-per-user", "4"]
    arguments += ["--epsilons", "2", "--compute", "32", "64", "--diversities", "0.5", "--group-sizes", "1", "4"]
    arguments += ["--epsilon", "2", "--gradients-per-round", "64", "--rounds", "5", "--repetitions", "200"]
    assert run.main([*arguments, "--processes", "1", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["points"]
    assert len(rows) == 3 * 3
    assert all(row["agrees"] for row in rows)
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == {
        "error_against_epsilon.png",
        "error_against_gradients_per_round.png",
        "error_against_diversity.png",
        "who_wins.png",
    }
    assert "agree with the closed form" in capsys.readouterr().out
