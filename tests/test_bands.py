"""Bands of noise as options, and the plan that follows from them."""

import dataclasses
import math
from typing import Any

import pytest

from fedsim.config import OptimizerConfig, PlanConfig, RunConfig
from fedsim.errors import InvalidInput
from fedsim.plan import Plan, UserSizes, plan_from_json
from fedsim.plan.bands import AUTO, best, candidates_for, forecasts_for, in_words
from fedsim.privacy.events import PoissonSubsampledGaussian, Repeated
from fedsim.privacy.mechanisms.banded.workload import Workload, release_noise
from fedsim.sampling import CyclicPoisson, Poisson

SIZES = UserSizes.of_quantiles(3000, {0.5: 4})
SMALL: dict[str, Any] = {"gradients_per_round": 30, "rounds": 40, "epsilon": 6.0}


def planned(**values: Any) -> Plan:
    return RunConfig(plan=PlanConfig(**{**SMALL, **values})).plan_for(SIZES)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, 1),
        ({"mechanism": "banded"}, AUTO),
        ({"mechanism": "banded", "bands": "1"}, 1),
        ({"bands": "auto"}, AUTO),
        ({"bands": "4", "mechanism": "layer-noise"}, 4),
    ],
)
def test_bands_are_as_given_or_as_the_mechanism_asks(values: dict[str, Any], wanted: Any) -> None:
    assert PlanConfig(**values).wanted_bands == wanted


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"bands": "0"}, "plan.bands"),
        ({"bands": "-2"}, "plan.bands"),
        ({"bands": "2.5"}, "plan.bands"),
        ({"bands": "most"}, "plan.bands"),
        ({"bands": "41"}, "plan.bands"),
        ({"bands": "2", "mechanism": "randomised-laplace"}, "plan.bands"),
        ({"bands": "2", "adjacency": "replace-one-user"}, "plan.adjacency"),
        ({"bands": "auto", "noise_multiplier": 1.0}, "plan.noise-multiplier"),
    ],
)
def test_bands_that_cannot_be_are_refused_before_any_data(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        PlanConfig(**{**SMALL, **values})
    assert refused.value.field == field


def test_more_bands_than_groups_of_users_are_refused() -> None:
    with pytest.raises(InvalidInput, match="at most 2"):
        planned(bands="3", gradients_per_round=1200)


def test_users_take_turns_where_bands_need_it_and_nowhere_else() -> None:
    plan = planned(bands="4")
    assert (plan.bands, plan.sampling) == (4, CyclicPoisson(groups=4))
    assert plan.event() == Repeated(
        event=PoissonSubsampledGaussian(sampling_probability=0.04, noise_multiplier=plan.noise_multiplier), count=10
    )
    assert planned().sampling == Poisson()
    assert planned(bands="4", sampling="cyclic-poisson", sampling_options=("groups=8",)).sampling.separation == 8
    with pytest.raises(InvalidInput, match="poisson"):
        dataclasses.replace(plan, sampling=Poisson())
    assert plan_from_json(plan.to_json()) == plan


def test_auto_takes_the_least_that_was_promised_and_meets_epsilon() -> None:
    workload = OptimizerConfig().workload(40)
    draft = PlanConfig(**SMALL).draft(SIZES)
    found = forecasts_for(draft, AUTO, workload, epsilon=6.0, tolerance=0.01)
    assert [one.bands for one in found] == [1, 2, 4, 8, 16, 32]
    assert best(found).error <= 1.01 * min(one.error for one in found)
    assert best(found).ratio < 0.85
    plan = planned(mechanism="banded")
    assert (plan.bands, plan.noise_coefficients) == (best(found).bands, best(found).coefficients)
    assert 5.95 < plan.epsilon().upper <= 6
    words = in_words(found, plan.bands, "adam", 40)
    assert f"noise is correlated over {plan.bands} rounds, which promises {best(found).ratio:.2f} times" in words


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"adjacency": "replace-one-user"}, "who is replaced may change groups"),
        ({"mechanism": "randomised-laplace", "clip_norm": 50.0}, "not Gaussian"),
        ({"epsilon": math.inf, "allow_no_privacy": True}, "no noise"),
        ({"gradients_per_round": 3000}, "everybody is in every round"),
        ({"rounds": 1}, "nothing to cancel"),
    ],
)
def test_auto_is_independent_noise_where_it_cannot_be_correlated(values: dict[str, Any], why: str) -> None:
    assert planned(bands="auto", **values).bands == 1, why


def test_candidates_are_as_many_as_there_are_users_and_rounds_for() -> None:
    assert candidates_for(1 / 8, 100) == [1, 2, 4, 8]
    assert candidates_for(1e-6, 5) == [1, 2, 4]
    assert candidates_for(1.0, 100) == [1]
    assert candidates_for(1e-6, 10**6)[-1] == 128


def test_forecasts_are_relative_to_independent_noise_at_the_same_epsilon() -> None:
    workload = Workload.prefix_sums(40)
    draft = PlanConfig(**SMALL).draft(SIZES)
    alone, four = forecasts_for(draft, 4, workload, epsilon=6.0)
    assert (alone.bands, alone.ratio, alone.release_ratio, alone.coefficients) == (1, 1.0, 1.0, (1.0,))
    assert alone.noise_multiplier == draft.calibrate(6.0).noise_multiplier
    assert four.noise_multiplier == pytest.approx(planned(bands="4").noise_multiplier, rel=1e-4)
    assert four.ratio == pytest.approx(four.error / alone.error)
    assert four.release_ratio > four.noise_multiplier / alone.noise_multiplier


def test_adams_steps_keep_their_size_with_correlated_noise() -> None:
    run = RunConfig(plan=PlanConfig(**SMALL, bands="auto"), optimizer=OptimizerConfig(learning_rate=2e-3))
    plan = run.plan_for(SIZES)
    (larger,) = (one.release_ratio for one in run.bands_forecasts(SIZES) if one.bands == plan.bands)
    assert larger > 1.2
    assert run.optimizer_for(plan, SIZES) == dataclasses.replace(run.optimizer, learning_rate=2e-3 * larger)
    # What is released in a round is as much larger as that, beside independent noise.
    alone = planned()
    single = plan.noise_multiplier * release_noise(plan.noise_coefficients, plan.steps)
    assert single / alone.noise_multiplier == pytest.approx(larger, rel=0.01)
    sgd = dataclasses.replace(run, optimizer=OptimizerConfig(name="sgd"))
    assert sgd.optimizer_for(plan, SIZES) == sgd.optimizer
    assert run.optimizer_for(alone, SIZES) == run.optimizer
    given = dataclasses.replace(run, plan=PlanConfig(**SMALL, bands="4", noise_multiplier=1.0))
    assert given.optimizer_for(given.plan_for(SIZES), SIZES) == given.optimizer
