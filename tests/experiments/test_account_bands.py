"""`account --bands`: noise correlated over rounds, and how much of it is left in sums of releases."""

import json
from typing import Any

import numpy as np
import pytest
import tyro

from experiments.account.command import Account
from experiments.run import main
from fedsim.errors import InvalidInput


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["account", *arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


SETTINGS = {
    "uls": ("--sampling-probability", str(128 / 14302), "--steps", "200"),
    "els": ("--algorithm", "els", "--group-size", "4", "--sampling-probability", str(128 / 57208), "--steps", "200"),
}


@pytest.mark.parametrize(("algorithm", "most"), [("uls", 0.50), ("els", 0.60)])
def test_bands_leave_about_half_the_noise_at_the_same_epsilon(
    algorithm: str, most: float, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SETTINGS[algorithm], "--target-epsilon", "8"]
    found = printed(capsys, *options, "--bands", "auto")
    assert found["bands"] > 1
    assert found["prefix_sum_noise_ratio"] <= most
    assert found["epsilon"]["upper"] <= 8
    # The ratio, from the parts that make it: noise multipliers and coefficients.
    steps, inverse = 200, np.zeros(200)
    inverse[0] = 1
    c = np.array([*found["noise_coefficients"], *np.zeros(steps - found["bands"])])
    for lag in range(1, steps):
        inverse[lag] = -(c[1 : lag + 1] @ inverse[lag - 1 :: -1][:lag])
    partial = np.cumsum(inverse)
    noise = found["noise_multiplier"] * np.linalg.norm(c) * np.sqrt(np.mean(np.cumsum(partial**2)))
    independent = found["independent_noise_multiplier"] * np.sqrt((steps + 1) / 2)
    assert found["prefix_sum_noise_ratio"] == pytest.approx(noise / independent, rel=0.01)
    alone = printed(capsys, *options)
    assert alone["noise_multiplier"] == pytest.approx(found["independent_noise_multiplier"], rel=1e-3)
    assert "bands" not in alone


def test_one_band_is_independent_noise(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, *SETTINGS["uls"], "--noise-multiplier", "0.6", "--bands", "1")
    alone = printed(capsys, *SETTINGS["uls"], "--noise-multiplier", "0.6")
    assert found["epsilon"] == alone["epsilon"]
    assert found["prefix_sum_noise_ratio"] == 1


def test_bands_cost_as_many_releases_as_a_users_turns(capsys: pytest.CaptureFixture[str]) -> None:
    # 200 steps in turns of 16 groups are 13 turns of some group.
    found = printed(capsys, *SETTINGS["uls"], "--noise-multiplier", "0.7", "--bands", "16")
    turns = ("--sampling-probability", str(16 * 128 / 14302), "--steps", "13", "--noise-multiplier", "0.7")
    assert found["epsilon"]["upper"] == pytest.approx(printed(capsys, *turns)["epsilon"]["upper"], rel=1e-9)


TURNS = ("--sampling", "none", "--groups", "111", "--steps", "200")


@pytest.mark.parametrize(("groups", "turns"), [("1", "200"), ("111", "2"), ("8", "25"), ("9", "23")])
def test_without_sampling_each_turn_costs_a_release(groups: str, turns: str, capsys) -> None:
    options = ("--sampling", "none", "--noise-multiplier", "2")
    found = printed(capsys, *options, "--groups", groups, "--steps", "200")
    assert found["groups"] == int(groups)
    assert found["epsilon"] == printed(capsys, *options, "--steps", turns)["epsilon"]
    of_group = (*options, "--algorithm", "els", "--group-size", "3")
    examples = printed(capsys, *of_group, "--groups", groups, "--steps", "200")
    assert examples["epsilon"] == printed(capsys, *of_group, "--steps", turns)["epsilon"]


def test_without_sampling_bands_cost_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    alone = printed(capsys, *TURNS, "--target-epsilon", "8")
    found = printed(capsys, *TURNS, "--target-epsilon", "8", "--bands", "auto")
    assert found["noise_multiplier"] == pytest.approx(alone["noise_multiplier"], rel=1e-3)
    assert found["prefix_sum_noise_ratio"] < 0.27
    assert 64 <= found["bands"] <= 111


@pytest.mark.parametrize(
    ("more", "field"),
    [
        (("--sampling", "none", "--groups", "0"), "groups"),
        (("--sampling", "none", "--groups", "4", "--bands", "5"), "bands"),
        (("--sampling", "none", "--groups", "4", "--adjacency", "replace-one-user"), "adjacency"),
        (("--sampling-probability", "0.1", "--groups", "4"), "groups"),
        (("--sampling", "fixed-size", "--cohort-size", "2", "--population-size", "9", "--bands", "2"), "bands"),
    ],
)
def test_groups_that_cannot_be_are_refused(more: tuple[str, ...], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        tyro.cli(Account, args=["--steps", "20", "--noise-multiplier", "1", *more]).result()
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("more", "field"),
    [
        (("--bands", "0", "--noise-multiplier", "1"), "bands"),
        (("--bands", "many", "--noise-multiplier", "1"), "bands"),
        (("--bands", "201", "--noise-multiplier", "1"), "bands"),
        (("--bands", "auto", "--noise-multiplier", "1"), "bands"),
        (("--bands", "112", "--noise-multiplier", "1"), "bands"),
        (("--bands", "4", "--noise-multiplier", "1", "--adjacency", "replace-one-user"), "adjacency"),
    ],
)
def test_bands_that_cannot_be_are_refused(more: tuple[str, ...], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        tyro.cli(Account, args=[*SETTINGS["uls"], *more]).result()
    assert refused.value.field == field


def test_a_bound_from_below_is_of_the_accounting_alone_where_nobody_knows_whose_turn_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for more, tight in (((), True), (("--bands", "1"), True), (("--bands", "4"), False)):
        options = [*SETTINGS["uls"], "--noise-multiplier", "0.7", *more]
        assert printed(capsys, *options)["tight"] == tight
        assert main(["account", *options]) == 0
        assert ("as far as it is accounted for here" in capsys.readouterr().out) == (not tight)
