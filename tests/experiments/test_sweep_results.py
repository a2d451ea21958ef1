"""What is made of a sweep's finished points: the choice of settings, intervals, gains, predictions, their order."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mock_sweep import row

from experiments.prediction import predict
from experiments.report.figures.sweep import by_bands, plot_outcomes
from experiments.report.sweep import outcome
from experiments.sweep.results import cells_of, gains_of_bands, half_width, lead
from fedsim.config import PlanConfig, RunConfig


def test_settings_are_chosen_on_validation_users_and_reported_on_test_users() -> None:
    rows = [row("uls", 1, seed, 3.0, 3.5 + 0.1 * seed) for seed in range(3)]
    rows += [row("uls", 2, seed, 3.1, 3.2) for seed in range(3)]
    rows += [row("uls", 4, 0, 2.0, 2.0)]
    (cell,) = cells_of(rows)
    assert cell["best"]["group_size"] == 1, "4 has the least validation loss, but of one seed only"
    assert cell["best"]["loss"] == pytest.approx(3.6)
    assert cell["best"]["half_width"] == pytest.approx(4.3027 * 0.1 / np.sqrt(3), rel=1e-3)
    assert len(cell["settings"]) == 3


def test_arms_come_in_one_order_in_tables_and_legends(tmp_path: Path) -> None:
    arms = ("nonprivate", "els", "uls")
    rows = [row(arm, 1, 0, 3.0, 3.5, epsilon=epsilon) for arm in arms for epsilon in (2.0, 8.0)]
    cells = cells_of(rows)
    assert [(cell["arm"], cell["epsilon"]) for cell in cells[:4]] == [("uls", 2), ("uls", 8), ("els", 2), ("els", 8)]
    drawing = plot_outcomes(by_bands(cells), 4.0, "epsilon", tmp_path / "figure.png")
    assert [line[0] for line in drawing.rows] == ["ULS"] * 2 + ["ELS"] * 2 + ["no privacy"] * 2
    places = [drawing.svg.rindex(f">{name}<") for name in ("ULS", "ELS", "no privacy", "pre-trained")]
    assert places == sorted(places)


def test_what_bands_gained_is_told_at_the_best_setting_of_each() -> None:
    rows = [row("uls", 1, seed, 3.0, 3.5 + 0.1 * seed) for seed in range(3)]
    rows += [row("uls", 2, seed, 2.9, 3.4 + 0.1 * seed) for seed in range(3)]
    rows += [row("uls", 1, seed, 2.8, 3.2 + 0.1 * seed, "auto") for seed in range(3)]
    rows += [row("els", 1, seed, 2.8, 3.2 + 0.1 * seed, "4") for seed in range(3)]
    (gain,) = gains_of_bands(cells_of(rows))  # nothing of the baseline, which was not run with independent noise
    assert (gain["arm"], gain["bands"], gain["bands_used"], gain["predicted_noise_ratio"]) == ("uls", "auto", 8, 0.6)
    assert gain["gain"] == pytest.approx(0.2)
    assert gain["half_width"] == pytest.approx(2.7764 * 0.1 * np.sqrt(2 / 3), rel=1e-3)


def test_the_gain_that_less_noise_promises_follows_from_independent_noise_alone() -> None:
    rows = [row("uls", 1, 0, 3.0, 3.5), row("uls", 1, 0, 3.0, 3.8, epsilon=2.0, noise=0.02)]
    rows += [row("uls", 1, 0, 2.9, 3.1, "auto"), row("els", 1, 0, 3.0, 3.5), row("els", 1, 0, 3.0, 3.4, "auto")]
    rows += [row("uls", 1, 0, 2.9, 1.0, "auto", epsilon=2.0)]
    found = {(gain["arm"], gain["epsilon"]): gain for gain in gains_of_bands(cells_of(rows))}
    assert found["uls", 8.0]["loss_saved_by_half_the_noise"] == pytest.approx(0.3)
    assert found["uls", 8.0]["predicted_gain"] == pytest.approx(-0.3 * np.log2(0.6))
    assert found["uls", 2.0]["predicted_gain"] == pytest.approx(-0.3 * np.log2(0.6)), (
        "whatever correlated noise gained"
    )
    assert found["els", 8.0]["predicted_gain"] is None, "run at one ε alone"
    assert found["els", 8.0]["gain"] == pytest.approx(0.1)


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
    *sentences, mark = json.loads(json.dumps(prediction.to_json()))["in_words"]
    assert len(sentences) == 4
    assert mark.startswith("Not private: computed from the data to be protected, without noise: number of training")
    fixed = predict(config, users([8] * 1000), {"uls": 1, "els": 8}).in_words()
    assert fixed[0].startswith("With the group sizes of this run. However alike")
    assert len(fixed) == 3 + 1  # with one example of each user it makes no difference how alike a user's gradients are

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
