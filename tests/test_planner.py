"""The planner: the signs it must get right, user sizes, gradient norms, and what it refuses."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import run
from experiments.plan.budget import BudgetConfig
from experiments.plan.command import parse_quantiles
from experiments.plan.words import change_of_mind
from fedsim.errors import InvalidInput
from fedsim.plan import ElsPlan, UlsPlan, UserSizes
from fedsim.planner import (
    ALIGNED,
    ORTHOGONAL,
    NormCurve,
    Target,
    break_even_norm,
    calibrated_plans,
    compare,
    default_group_sizes,
    draft_plan,
    predicted_noise,
    what_if,
)

SIXTEEN_EACH = UserSizes.of_quantiles(10_000, {0.5: 16})


def target(epsilon: float = 1.0, gradients: float = 512, rounds: int = 1000) -> Target:
    return Target(epsilon=epsilon, delta=1e-6, gradients_per_round=gradients, rounds=rounds)


def noise_ratio(plans: list, group_size: int, curve: NormCurve) -> float:
    """ELS noise over the noise of ULS with this group size."""
    uls = next(plan for plan in plans if plan.name == "uls" and plan.group_size == group_size)
    els = next(plan for plan in plans if plan.name == "els")
    return predicted_noise(els, curve, 16) / predicted_noise(uls, curve, 16)


def test_large_compute_favours_uls_for_orthogonal_gradients_and_els_for_aligned_ones() -> None:
    plans = calibrated_plans(SIXTEEN_EACH, target(), {"uls": [8, 16], "els": [16]})
    assert noise_ratio(plans, 8, ORTHOGONAL) == pytest.approx(2.13, abs=0.02)
    assert noise_ratio(plans, 8, ALIGNED) == pytest.approx(0.75, abs=0.01)
    assert noise_ratio(plans, 16, ORTHOGONAL) == pytest.approx(1.99, abs=0.02)
    assert noise_ratio(plans, 16, ALIGNED) == pytest.approx(0.50, abs=0.01)
    assert compare(plans, SIXTEEN_EACH, ORTHOGONAL).winner == "uls"
    assert compare(plans, SIXTEEN_EACH, ALIGNED).winner == "els"
    assert compare(plans, SIXTEEN_EACH, ORTHOGONAL).plans["uls"].group_size == 8


def test_at_small_compute_single_examples_are_best_and_the_algorithms_level() -> None:
    plans = calibrated_plans(SIXTEEN_EACH, target(gradients=64), {"uls": [1, 2, 8], "els": [16]})
    assert noise_ratio(plans, 1, ORTHOGONAL) == pytest.approx(1.01, abs=0.02)
    assert noise_ratio(plans, 8, ORTHOGONAL) == pytest.approx(0.60, abs=0.02)
    assert noise_ratio(plans, 8, ALIGNED) == pytest.approx(0.21, abs=0.01)
    found = compare(plans, SIXTEEN_EACH, ORTHOGONAL)
    assert (found.plans["uls"].group_size, found.winner) == (1, "level")


def test_weaker_privacy_shrinks_the_lead_of_uls() -> None:
    plans = calibrated_plans(SIXTEEN_EACH, target(epsilon=4), {"uls": [8], "els": [16]})
    assert noise_ratio(plans, 8, ORTHOGONAL) == pytest.approx(1.09, abs=0.02)
    assert noise_ratio(plans, 8, ALIGNED) == pytest.approx(0.39, abs=0.01)


def test_plans_are_calibrated_to_the_target_and_keep_the_compute() -> None:
    for plan in calibrated_plans(SIXTEEN_EACH, target(rounds=50), {"uls": [4], "els": [16]}):
        assert 0.98 < plan.epsilon().upper <= 1.0
        assert plan.gradients_per_round == pytest.approx(512)


def test_single_examples_of_uls_never_need_more_noise_than_els() -> None:
    # A Binomial(G, p) share is a convex-order spread of a single draw with probability Gp.
    sizes = UserSizes.of_quantiles(200, {0.5: 8})
    plans = calibrated_plans(sizes, target(epsilon=3, gradients=100, rounds=20), {"uls": [1], "els": [2, 8]})
    uls = plans[0].noise_multiplier
    assert uls <= plans[1].noise_multiplier * (1 + 1e-3) <= plans[2].noise_multiplier * (1 + 2e-3)
    assert plans[2].noise_multiplier > 1.02 * uls


def test_what_would_change_its_mind() -> None:
    sizes = UserSizes.of_quantiles(1000, {0.5: 8})
    here = target(epsilon=1, gradients=256, rounds=20)
    found = compare(calibrated_plans(sizes, here, {"uls": [1, 4, 8], "els": [8]}), sizes, ORTHOGONAL)
    cases = what_if(sizes, here, found)
    assert set(cases) == {"4× the compute", "1/4 of the compute", "4× the ε", "1/4 of the ε"}
    assert cases["4× the compute"].ratio > found.ratio > cases["1/4 of the compute"].ratio
    assert cases["1/4 of the ε"].ratio > found.ratio > cases["4× the ε"].ratio
    much = target(epsilon=1, gradients=4000, rounds=20)
    found = compare(calibrated_plans(sizes, much, {"uls": [4], "els": [8]}), sizes, ORTHOGONAL)
    assert "4× the compute" not in what_if(sizes, much, found), "more than the data holds"


def test_break_even_norm_is_where_predictions_meet() -> None:
    uls = UlsPlan(
        num_users=100, sampling_probability=0.1, group_size=4, clip_norm=1, noise_multiplier=2, steps=1, delta=0.1
    )
    els = ElsPlan(
        num_examples=400, sampling_probability=0.1, group_size=4, clip_norm=1, noise_multiplier=5, steps=1, delta=0.1
    )
    norm = break_even_norm(uls, els)
    level = NormCurve(name="measured", group_sizes=(1, 4), norms=(1.0, norm))
    assert predicted_noise(uls, level, 4) == pytest.approx(predicted_noise(els, level, 4))
    sizes = UserSizes.of_quantiles(100, {0.5: 4})
    assert (
        change_of_mind([uls, els], compare([uls, els], sizes, ALIGNED), sizes)
        == [f"ULS with G = 4 is ahead of ELS as long as L(4)/L(1) < {norm:.2f}."]
        or norm <= 0.5
    )


def test_norm_curves() -> None:
    assert ALIGNED(64) == 1
    assert ORTHOGONAL(16) == pytest.approx(0.25)
    assert NormCurve.of_alignment("assumed", 0.25)(4) == pytest.approx(np.sqrt(0.25 + 0.75 / 4))
    measured = NormCurve.measured([1, 4], [3.0, 1.5])
    assert measured(2) == pytest.approx(0.5**0.5)
    assert measured(100) == pytest.approx(0.5), "held beyond what was measured"
    with pytest.raises(InvalidInput, match="alignment"):
        NormCurve.of_alignment("assumed", 1.5)
    with pytest.raises(InvalidInput, match="ascending from 1"):
        NormCurve.measured([2, 4], [1.0, 1.0])


def test_user_sizes_from_a_store_are_exact_and_named_private() -> None:
    view = SimpleNamespace(num_users=4, user_offsets=np.array([0, 1, 4, 6, 16]))
    sizes = UserSizes.of_users(view)
    assert (sizes.num_users, sizes.median, sizes.kept(3), sizes.kept(100)) == (4, 2, 9, 16)
    assert sizes.private
    assert not UserSizes.of_quantiles(4, {0.5: 2}).private


def test_user_sizes_from_quantiles_go_through_them() -> None:
    sizes = UserSizes.of_quantiles(1000, parse_quantiles(("0.5:12", "0.9:65", "1:1404")))
    assert sizes.median == 12
    assert sizes.quantile(0.9) == pytest.approx(65, abs=1)
    assert sizes.kept(1) == 1000
    assert sizes.kept(2000) > sizes.kept(64) > 10 * 1000
    with pytest.raises(InvalidInput, match="do not fall"):
        UserSizes.of_quantiles(10, {0.5: 4, 0.9: 2})
    with pytest.raises(InvalidInput, match="user-sizes"):
        parse_quantiles(("half:3",))


def test_a_user_cannot_average_over_more_than_it_owns() -> None:
    sizes = UserSizes.of_quantiles(1000, {0.5: 4})
    plan = draft_plan("uls", 16, sizes, target(gradients=64))
    assert plan is not None
    assert predicted_noise(plan, ORTHOGONAL, sizes.median) == pytest.approx(0.5 / 4)


def test_a_budget_larger_than_the_data_is_refused() -> None:
    sizes = UserSizes.of_quantiles(10, {0.5: 4})
    assert draft_plan("els", 4, sizes, target(gradients=41)) is None
    assert draft_plan("uls", 1, sizes, target(gradients=11)) is None
    with pytest.raises(InvalidInput, match="gradients-per-round"):
        calibrated_plans(sizes, target(gradients=1000))


def test_default_group_sizes_reach_the_heavy_users_and_hold_the_median() -> None:
    sizes = UserSizes.of_quantiles(1000, {0.5: 12, 0.9: 65, 1.0: 1404})
    assert default_group_sizes(sizes, target()) == [1, 2, 4, 8, 12, 16, 32, 64]


def test_budgets_in_tokens_and_hours_become_gradients_a_round() -> None:
    by_tokens = BudgetConfig(tokens=1e6, tokens_per_example=50, rounds=100).target()
    assert by_tokens.gradients_per_round == pytest.approx(200)
    by_hours = BudgetConfig(hours=1, tokens_per_second=1e6 / 3600, tokens_per_example=50, rounds=100).target()
    assert by_hours.gradients_per_round == pytest.approx(200)
    with pytest.raises(InvalidInput, match="tokens-per-second"):
        BudgetConfig(hours=1).target()


def test_the_command_prints_json_and_draws(tmp_path, capsys) -> None:
    arguments = ["plan", "--num-users", "500", "--user-sizes", "0.5:4", "--plan.epsilon", "2", "--plan.rounds", "10"]
    arguments += ["--plan.gradients-per-round", "64", "--group-sizes", "1", "4", "--alignment", "0.2"]
    assert run.main([*arguments, "--json", "--output", str(tmp_path)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [found["norms"] for found in answer["verdicts"]] == ["assumed", "aligned", "orthogonal"]
    assert answer["private_statistics"] == []
    assert len(answer["plans"]) == 4
    assert (tmp_path / "predicted_noise.png").stat().st_size > 5000
    assert run.main(arguments) == 0
    assert "ULS" in capsys.readouterr().out


def test_the_command_refuses_sizes_without_users(capsys) -> None:
    assert run.main(["plan", "--user-sizes", "16"]) == 2
    assert "num-users" in capsys.readouterr().err


def test_the_command_refuses_groups_of_no_example(capsys) -> None:
    assert run.main(["plan", "--num-users", "100", "--user-sizes", "4", "--group-sizes", "0"]) == 2
    assert "group-size" in capsys.readouterr().err


@pytest.mark.parametrize("total", [(), ("--plan.total-gradients", "1000")])
def test_a_delta_that_permits_publishing_a_user_is_refused_as_in_training(
    total: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "--num-users", "100", "--user-sizes", "4", "--plan.delta", "0.01", *total]
    assert run.main(command) == 2
    assert "below one over the number of training users, 0.01" in capsys.readouterr().err


def test_users_of_more_examples_than_are_accounted_for_are_planned_with_as_many_as_are(capsys) -> None:
    arguments = ["plan", "--num-users", "200", "--user-sizes", "2000000", "--plan.gradients-per-round", "64"]
    assert run.main([*arguments, "--plan.rounds", "2", "--group-sizes", "4", "--json"]) == 0
    groups = {
        plan["group_size"] for plan in json.loads(capsys.readouterr().out)["plans"] if plan["algorithm"] == "els"
    }
    assert groups == {4, 1_000_000}
    assert run.main([*arguments, "--group-sizes", "2000000"]) == 2
    assert "group-sizes is 2000000" in capsys.readouterr().err
