"""The audit drives what trains: local steps, every user's rows, and everything else of the plan."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clients.worker
from experiments.audit.attacks import attacks, one_run
from experiments.audit.black_box import JoinedUsers, black_box_canaries
from experiments.audit.canaries import CanaryUsers
from experiments.audit.promises import promises
from experiments.audit.rig import Rig
from fedsim.config import EngineConfig, PlanConfig, RunConfig
from fedsim.data.config import DataConfig
from fedsim.models.config import ModelConfig, SmallModelConfig
from fedsim.plan import ElsPlan, Plan, UlsPlan, UserSizes
from fedsim.resources import open_resources
from fedsim.sampling import CyclicPoisson

PLAN = UlsPlan(
    num_users=3, sampling_probability=1.0, group_size=1, clip_norm=1.0, noise_multiplier=0.0, steps=2, delta=1e-5
)


def put_in(plan: UlsPlan, update: np.ndarray) -> np.ndarray:
    users = CanaryUsers(np.ones(3, dtype=np.int64), np.array([1, 0, 0]))
    table = np.stack([np.zeros_like(update), update]).astype(np.float32)
    rig = Rig(plan, users, table, sampling_seed=1, noise_seed=2)
    return rig.seen(rig.round(), 0).sum


def test_local_steps_are_taken_under_audit() -> None:
    update = np.array([0.01, -0.02, 0.03, 0.0, 0.0, 0.0, 0.0, 0.01])
    np.testing.assert_allclose(put_in(PLAN, update), update, atol=1e-7)
    local = dataclasses.replace(PLAN, local_steps=3, local_learning_rate=0.5)
    # The loss is linear: three steps go three times 0.5 along a gradient that is prescribed 1.5 times as small. Were
    # they left out, less would be put in, and whatever a local learning rate makes small would never be clipped.
    np.testing.assert_allclose(put_in(local, update), update, atol=1e-7)
    small = dataclasses.replace(local, local_learning_rate=1e-6)
    np.testing.assert_allclose(put_in(small, update), update, atol=1e-6)
    assert np.linalg.norm(put_in(local, 1000 * update)) == pytest.approx(1.0, rel=1e-4)


SMALLEST: list[Plan] = [
    UlsPlan(
        num_users=1, sampling_probability=1.0, group_size=4, clip_norm=1.0, noise_multiplier=2.0, steps=2, delta=1e-5
    ),
    ElsPlan(
        num_examples=2,
        sampling_probability=0.5,
        group_size=4,
        clip_norm=1.0,
        noise_multiplier=2.0,
        steps=2,
        delta=1e-5,
    ),
]
SMALLEST += [
    dataclasses.replace(
        plan, sampling=CyclicPoisson(groups=2), sampling_probability=0.5, noise_coefficients=(1.0, 0.5)[:bands]
    )
    for plan, bands in zip(SMALLEST, (2, 1), strict=True)
]


@pytest.mark.parametrize("plan", SMALLEST)
def test_the_smallest_populations_can_be_audited(plan: Plan) -> None:
    assert [promise for promise in promises(plan, 3) if not promise.kept] == []
    assert not any(finding.contradicts for finding in attacks(plan, trials=32, canaries=16, confidence=0.99, seed=3))


def test_a_clip_norm_that_follows_absent_users_does_not_run_away_under_audit() -> None:
    moving = dataclasses.replace(
        PLAN, num_users=40, noise_multiplier=1.0, clip_quantile=0.9, clip_count_std=3.0, steps=1500
    )
    one_run(moving, 16, 0.99, 3)


@pytest.mark.parametrize("algorithm", ["uls", "els"])
def test_black_box_canaries_train_as_the_plan_says(
    algorithm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    small = SmallModelConfig(layers=1, width=16, heads=2, vocabulary_size=300, steps=2)
    local_steps = 3 if algorithm == "uls" else 1
    config = RunConfig(
        data=DataConfig(packages=("numpy",), sequence_length=16),
        model=ModelConfig(small=small),
        plan=PlanConfig(algorithm=algorithm, rounds=2, gradients_per_round=8, delta=1e-3, local_steps=local_steps),
        engine=EngineConfig(kind="local"),
    )
    plan = config.plan.for_users(UserSizes.of_users(open_resources(config).store.split("train")))
    seen: list[int] = []
    clipped_sum = clients.worker.clipped_sum

    def noted(*arguments: Any, **more: Any) -> Any:
        seen.append(1 if more["local_steps"] is None else more["local_steps"].steps)
        return clipped_sum(*arguments, **more)

    monkeypatch.setattr(clients.worker, "clipped_sum", noted)
    found = black_box_canaries(config, plan, canaries=16, repetitions=2, confidence=0.9, seed=3)
    assert set(seen) == {local_steps}
    assert found.canaries == (8, 8)
    assert "not private" in found.in_words()


def test_copies_of_users_are_users_of_their_own() -> None:
    users = CanaryUsers(np.array([2, 1]), np.array([10, 11, 12]))
    others = CanaryUsers(np.array([1, 2, 3]), np.array([20, 21, 22, 23, 24, 25]))
    joined = JoinedUsers(users, others, np.array([2, 0, 2]))
    assert joined.user_offsets.tolist() == [0, 2, 3, 6, 7, 10]
    assert joined.take(np.array([9, 0, 6, 3, 2])).tokens.tolist() == [25, 10, 20, 23, 12]
    assert joined.num_rows == len(joined.row_lengths) == 10
