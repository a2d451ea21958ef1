"""Where a total of gradient evaluations goes: what is chosen, what it is calibrated to, and what is refused."""

import json

import pytest

from experiments import run
from experiments.plan.budget import BudgetConfig
from experiments.plan.command import PlanCommand
from experiments.presets import load_preset
from fedsim.config import OptimizerConfig
from fedsim.errors import InvalidInput
from fedsim.plan import UserSizes
from fedsim.plan.bands import candidates_for, with_bands
from fedsim.planner import ASSUMED_SIGNAL, SignalCurve, Total, allocate, allocation, calibrated_plans, effective_rounds
from fedsim.planner.allocation import LEAST_COHORT, estimated_noise, gaussian_shift
from fedsim.planner.candidates import calibrated
from fedsim.privacy.events import Adjacency
from fedsim.privacy.gaussian_curve import gaussian_epsilon
from fedsim.privacy.mechanisms.banded.coefficients import optimal_coefficients

SMALL = UserSizes.of_quantiles(400, {0.5: 8})
CHAT = UserSizes.of_quantiles(14_302, {0.5: 5, 0.9: 30, 1: 6138})
SGD = OptimizerConfig(name="sgd").workload
FEW_ROUNDS = (25, 35, 50)
COMMAND = ["plan", "--num-users", "400", "--user-sizes", "8", "--optimizer.name", "sgd"]
TOTAL = ["--plan.total-gradients", "2000", "--trainable-parameters", "2000"]


def total(gradients: float, epsilon: float = 8.0) -> Total:
    return Total(epsilon=epsilon, delta=1e-5, gradients=gradients)


def everything(algorithm: str, sizes: UserSizes, spent: Total, parameters: int) -> dict[tuple[int, int, int], float]:
    """Effective rounds of every (rounds, group size, bands), each calibrated."""
    found = {}
    for rounds in FEW_ROUNDS:
        target = spent.over(rounds)
        try:
            plans = calibrated_plans(sizes, target, {algorithm: [1, 2, 8]})
        except InvalidInput:
            continue
        for plan in plans:
            if plan.normaliser < LEAST_COHORT:
                continue
            for bands in (one for one in candidates_for(plan.sampling_probability, rounds) if one <= 8):
                fitted = optimal_coefficients(bands, SGD(rounds))
                ratio = SGD(rounds).error(fitted) / SGD(rounds).error((1.0,))
                banded = calibrated(with_bands(plan, bands, fitted), spent.epsilon, plan.noise_multiplier)
                worth = effective_rounds(banded, ASSUMED_SIGNAL, parameters, ratio)
                found[rounds, plan.group_size, bands] = worth
    return found


@pytest.mark.parametrize(
    ("algorithm", "gradients", "epsilon", "parameters"), [("uls", 2000, 8.0, 2000), ("els", 2000, 1.0, 300)]
)
def test_what_is_chosen_is_the_best_of_everything_calibrated(
    algorithm: str, gradients: float, epsilon: float, parameters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation, "ROUNDS", FEW_ROUNDS)
    spent = total(gradients, epsilon)
    best = allocate(SMALL, spent, ASSUMED_SIGNAL, parameters, SGD, [1, 2, 8])[algorithm][0]
    worths = everything(algorithm, SMALL, spent, parameters)
    assert len(worths) >= 15
    assert best.effective_rounds >= max(worths.values()) * 0.97, max(worths, key=worths.__getitem__)
    place = best.plan.steps, best.plan.group_size, best.plan.bands
    assert best.effective_rounds == pytest.approx(worths[place], rel=0.01)


def test_every_allocation_keeps_total_and_guarantee() -> None:
    found = allocate(CHAT, total(25_600), ASSUMED_SIGNAL, 260_032, OptimizerConfig(name="adam").workload)
    assert set(found) == {"uls", "els"}
    for ways in found.values():
        worths = [way.effective_rounds for way in ways]
        assert worths == sorted(worths, reverse=True)
        assert len({way.plan.steps for way in ways}) >= 6
        for way in ways:
            assert way.plan.steps * way.plan.gradients_per_round == pytest.approx(25_600, rel=0.05)
            assert way.plan.normaliser >= LEAST_COHORT
            assert way.plan.sampling_probability * way.plan.bands <= 1
        assert 0.98 * 8 < ways[0].plan.epsilon().upper <= 8


def test_the_prototypes_corpus_is_advised_what_came_out_best_there() -> None:
    """Of the same total 512 users in 50 rounds with four bands ended best, 128 in 200 without bands worst."""
    signal = SignalCurve.measured([1, 2, 4, 8, 16], [0.11, 0.18, 0.27, 0.38, 0.48])
    found = allocate(CHAT, total(25_600), signal, 260_032, OptimizerConfig(name="adam").workload)["uls"]
    best = found[0]
    assert 35 <= best.plan.steps <= 70
    assert best.plan.group_size == 1
    assert best.plan.bands in (4, 8)
    observed = next(way for way in found if (way.plan.steps, way.plan.bands) == (50, 4))
    assert observed.effective_rounds > 0.95 * best.effective_rounds


SPEECHES = UserSizes.of_quantiles(1_098, {0.1: 1, 0.25: 3, 0.5: 13, 0.75: 45, 0.9: 125, 0.99: 336, 1: 768})
FEW_STEPS = {(6, 4): 3.866, (12, 4): 3.442, (25, 2): 3.360}
"""Held-out loss by (rounds, group size) of ULS on speeches, 25,600 gradients at ε = 8: Adam at the better of two
learning rates, independent noise, one seed; 4.668 before training."""


def test_fewer_rounds_are_not_advised_where_models_fell_behind_the_prediction() -> None:
    signal = SignalCurve.measured([1, 2, 4, 8, 16], [0.12, 0.22, 0.33, 0.48, 0.63])
    worth = {}
    for rounds, group in FEW_STEPS:
        plan = calibrated_plans(SPEECHES, total(25_600).over(rounds), {"uls": [group]})[0]
        worth[rounds, group] = effective_rounds(plan, signal.among(SPEECHES), 260_032)
    assert max(worth, key=worth.__getitem__) == (6, 4) == max(FEW_STEPS, key=FEW_STEPS.__getitem__)
    found = allocate(SPEECHES, total(25_600), signal, 260_032, OptimizerConfig(name="adam").workload)
    assert found["uls"][0].plan.steps == 25 == min(way.plan.steps for ways in found.values() for way in ways)


def test_noise_makes_rounds_few_and_its_absence_many() -> None:
    much = allocate(CHAT, total(25_600, 1.0), ASSUMED_SIGNAL, 10**7, SGD, [1])["uls"][0].plan
    some = allocate(CHAT, total(25_600, 8.0), ASSUMED_SIGNAL, 10**5, SGD, [1])["uls"][0].plan
    none = allocate(CHAT, total(25_600, 32.0), ASSUMED_SIGNAL, 10, SGD, [1])["uls"][0].plan
    assert much.steps < some.steps < none.steps


def test_estimates_are_near_what_is_certified() -> None:
    shift = gaussian_shift(8.0, 1e-5)
    assert gaussian_epsilon(shift, 1e-5).upper == pytest.approx(8.0, rel=1e-6)
    for rounds in (25, 100, 400):
        plan = calibrated_plans(CHAT, total(25_600).over(rounds), {"uls": [1]})[0]
        about = estimated_noise(shift, plan.sampling_probability, rounds)
        assert about == pytest.approx(plan.noise_multiplier, rel=0.3)
    assert estimated_noise(shift, 1.0, 25) == pytest.approx(5 / shift)
    assert estimated_noise(shift, 3.0, 25) == pytest.approx(15 / shift)


def test_bands_are_not_advised_where_they_are_not_offered() -> None:
    spent = Total(epsilon=8.0, delta=1e-5, gradients=2000, adjacency=Adjacency.REPLACE_ONE_USER)
    found = allocate(SMALL, spent, ASSUMED_SIGNAL, 2000, SGD)
    assert {way.plan.bands for ways in found.values() for way in ways} == {1}


def test_totals_that_nobody_can_spend_are_refused() -> None:
    with pytest.raises(InvalidInput, match="at least 200"):
        total(199)
    with pytest.raises(InvalidInput, match=r"total-gradients is .* at most about 3,200,000"):
        allocate(SMALL, total(1e8), ASSUMED_SIGNAL, 2000, SGD)


def test_the_command_answers_and_its_flags_make_the_plan(tmp_path, capsys) -> None:
    arguments = [*COMMAND, *TOTAL, "--plan.epsilon", "2", "--output", str(tmp_path)]
    assert run.main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    best = answer["best"]
    assert best["effective_rounds"] == max(ways[0]["effective_rounds"] for ways in answer["allocations"].values())
    words = best["flags"].split()
    assert dict(zip(words[::2], words[1::2], strict=True)) == {
        "--plan.algorithm": best["algorithm"],
        "--plan.epsilon": "2",
        "--plan.delta": "1e-05",
        "--plan.gradients-per-round": str(round(best["gradients_per_round"])),
        "--plan.rounds": str(best["rounds"]),
        "--plan.group-size": str(best["group_size"]),
        "--plan.bands": str(best["bands"]),
    }
    assert (tmp_path / "effective_rounds.png").stat().st_size > 5000
    assert run.main(arguments) == 0
    printed = capsys.readouterr().out
    assert best["flags"] in printed
    assert "public" in printed


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--plan.rounds", "20"], "plan.rounds is 20"),
        (["--plan.gradients-per-round", "64"], "plan.gradients-per-round is 64"),
        (["--plan.tokens", "1e6"], "plan.tokens"),
        (["--plan.hours", "1"], "plan.hours"),
        (["--similarity", "0.4", "--alignment", "0.3"], "alignment is 0.3"),
        (["--measure", "--similarity", "0.4"], "similarity is 0.4"),
        (["--plan.total-gradients", "5"], "plan.total-gradients is 5"),
    ],
)
def test_what_does_not_go_with_a_total_is_refused_by_name(more: list[str], named: str, capsys) -> None:
    assert run.main([*COMMAND, *TOTAL, *more]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--similarity", "--trainable-parameters"])
def test_what_goes_with_a_total_alone_is_refused_without(option: str, capsys) -> None:
    assert run.main([*COMMAND, option, "1"]) == 2
    assert option.strip("-") in capsys.readouterr().err


def test_a_total_takes_the_place_of_a_presets_rounds() -> None:
    path = ["--data.path", "anywhere"]
    plain = load_preset(PlanCommand, "shakespeare", path)
    assert (plain.plan.rounds, plain.plan.gradients_per_round) == (12, 256)
    chosen = load_preset(PlanCommand, "shakespeare", [*path, "--plan.total-gradients=3072"])
    assert (chosen.plan.rounds, chosen.plan.gradients_per_round) == (None, None)
    assert BudgetConfig().target().rounds == 16
