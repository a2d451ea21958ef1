"""What is common to the arms of a comparison, and what is each one's own."""

from pathlib import Path

import pytest

from experiments.compare import ArmConfig, Compare
from fedsim.config import OptimizerConfig, PlanConfig
from fedsim.plan.bands import AUTO


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


def test_an_average_is_the_arms_own_or_common_to_both(tmp_path: Path) -> None:
    common = OptimizerConfig(average="exponential", average_decay=0.9)
    compare = Compare(optimizer=common, els=ArmConfig(average="none", learning_rate=0.5))
    uls, els = (compare.arm(name, tmp_path).optimizer for name in ("uls", "els"))
    assert uls == common
    assert els == OptimizerConfig(learning_rate=0.5)


@pytest.mark.parametrize(
    ("plan", "mechanisms", "expected"),
    [
        (PlanConfig(), (None,), [AUTO]),
        (PlanConfig(bands="1"), (None,), [1]),
        (PlanConfig(noise_multiplier=1.0), (None,), [1]),
        (PlanConfig(sampling="none", buffers=1), (None,), [1]),
        (PlanConfig(), ("gaussian", "banded", "quantile-clip"), [1, AUTO, 1]),
        (PlanConfig(bands="4"), ("gaussian", "banded"), [1, 4]),
        (PlanConfig(bands="4"), ("gaussian", "layer-noise"), [4, 4]),
    ],
)
def test_bands_are_the_best_of_each_arm_or_what_sets_mechanisms_apart(
    tmp_path: Path, plan: PlanConfig, mechanisms: tuple[str | None, ...], expected: list[object]
) -> None:
    compare = Compare(plan=plan, mechanisms=tuple(name for name in mechanisms if name))
    assert [compare.arm("uls", tmp_path, name).plan.wanted_bands for name in mechanisms] == expected
