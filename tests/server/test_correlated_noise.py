"""Correlated noise in real rounds: as little of it is left in the weights as was predicted."""

import dataclasses

import numpy as np
import pytest

from experiments.audit.canaries import CanaryUsers
from experiments.audit.rig import Rig
from fedsim.config import OptimizerConfig
from fedsim.optimizer import ServerOptimizer
from fedsim.plan import ElsPlan, Plan, UlsPlan
from fedsim.plan.bands import AUTO, best, forecasts_for, with_bands
from fedsim.privacy.mechanisms.banded.workload import Workload

ROUNDS, VALUES = 60, 3000
ULS = UlsPlan(
    num_users=2000,
    group_size=1,
    sampling_probability=0.02,
    clip_norm=0.5,
    noise_multiplier=1.0,
    steps=ROUNDS,
    delta=1e-5,
)
ELS = ElsPlan(
    num_examples=4000,
    group_size=2,
    sampling_probability=0.01,
    clip_norm=0.5,
    noise_multiplier=1.0,
    steps=ROUNDS,
    delta=1e-5,
)


def left_in_weights(plan: Plan, optimizer: OptimizerConfig, noise_seed: int | None) -> float:
    """Root mean square over rounds of the weights' standard deviation, where nobody is there: all of it is noise."""
    owned = np.full(2000, plan.group_size)
    rig = Rig(
        plan,
        CanaryUsers(owned, np.zeros(owned.sum())),
        np.zeros((1, VALUES), dtype=np.float32),
        sampling_seed=1,
        noise_seed=noise_seed,
        workers=1,
    )
    round = rig.round(np.empty(0, dtype=np.int64))
    round.optimizer = ServerOptimizer(np.zeros(VALUES, dtype=np.float32), optimizer, plan.steps)
    squares = []
    for number in range(plan.steps):
        round.run(number, rig.gather)
        squares.append(np.mean(np.square(round.parameters, dtype=np.float64)))
    return float(np.sqrt(np.mean(squares)))


@pytest.mark.parametrize("noise_seed", [2, None], ids=["seeded", "secure"])
@pytest.mark.parametrize("plan", [ULS, ELS], ids=["uls", "els"])
@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerConfig(name="sgd", learning_rate=1.0),
        OptimizerConfig(name="momentum", learning_rate=1.0, schedule="linear"),
    ],
    ids=["sgd", "momentum"],
)
def test_the_noise_in_the_weights_is_what_was_predicted(
    plan: Plan, optimizer: OptimizerConfig, noise_seed: int | None
) -> None:
    found = forecasts_for(plan, AUTO, optimizer.workload(ROUNDS), epsilon=8.0, tolerance=0.01)
    chosen = best(found)
    assert chosen.bands > 1
    assert chosen.ratio < 0.75
    for forecast in (found[0], chosen):
        noised = dataclasses.replace(
            with_bands(plan, forecast.bands, forecast.coefficients), noise_multiplier=forecast.noise_multiplier
        )
        predicted = forecast.error * plan.clip_norm / plan.normaliser
        # Of 3,000 weights, whose noise over rounds is far from independent: three standard deviations and more.
        assert left_in_weights(noised, optimizer, noise_seed) == pytest.approx(predicted, rel=0.06)


def test_fitted_coefficients_leave_less_than_the_square_roots() -> None:
    workload = Workload.prefix_sums(ROUNDS)
    (forecast,) = (one for one in forecasts_for(ULS, 8, workload, epsilon=8.0) if one.bands == 8)
    root = np.cumprod([1.0, *((2 * k - 1) / (2 * k) for k in range(1, 8))])
    assert forecast.error < 0.99 * forecast.noise_multiplier * workload.error(root)
