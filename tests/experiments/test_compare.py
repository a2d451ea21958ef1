"""What is common to the arms of a comparison, and what is each one's own."""

from pathlib import Path

import pytest

from experiments.compare import ArmConfig, Compare
from fedsim.config import PlanConfig


@pytest.mark.parametrize(
    ("plan", "uls", "expected"),
    [
        (PlanConfig(), ArmConfig(), (1, 4)),
        (PlanConfig(group_size=8), ArmConfig(), (8, 8)),
        (PlanConfig(group_size=8), ArmConfig(group_size=2), (2, 8)),
    ],
)
def test_a_group_size_is_the_arms_own_or_the_plans_or_the_algorithms(
    tmp_path: Path, plan: PlanConfig, uls: ArmConfig, expected: tuple[int, int]
) -> None:
    compare = Compare(plan=plan, uls=uls)
    arms = [compare.arm("uls", tmp_path), compare.arm("els", tmp_path)]
    assert tuple(arm.plan.examples_per_user for arm in arms) == expected
    assert [arm.plan.algorithm for arm in arms] == ["uls", "els"]
