"""Log odds of canaries are those of the law that rounds have, from every way in which a canary may have taken part."""

import itertools
from typing import Any

import numpy as np
import pytest
import scipy

from experiments.audit.chains import by_turns, strength
from experiments.audit.odds import log_odds, probability_in_turn
from fedsim.plan import UlsPlan
from fedsim.sampling import SAMPLINGS


def plan_of(**changes: Any) -> UlsPlan:
    values: dict[str, Any] = {
        "num_users": 60,
        "sampling_probability": 0.1,
        "group_size": 1,
        "clip_norm": 0.5,
        "noise_multiplier": 0.8,
        "steps": 7,
        "delta": 1e-5,
    }
    return UlsPlan(**values | changes)


IN_TURN = {"sampling": SAMPLINGS.build("cyclic-poisson", ["groups=3"])}
PLANS = [
    ({}, 0.1),
    ({"sampling_probability": 1.0}, 1.0),
    (IN_TURN, 0.3),
    ({**IN_TURN, "noise_coefficients": (1.0, 0.5, -0.25)}, 0.3),
    ({**IN_TURN, "noise_coefficients": (1.0, 0.5), "sampling_probability": 1 / 3}, 1.0),
    ({"sampling": SAMPLINGS.build("none"), "sampling_probability": 1 / 3}, 1.0),
]


@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize(("changes", "probability"), PLANS)
def test_log_odds_are_of_every_way_to_have_taken_part(changes: dict[str, Any], probability: float, units: int) -> None:
    plan = plan_of(**changes)
    assert probability_in_turn(plan) == pytest.approx(probability)
    apart, rounds = plan.scheme.separation, plan.steps
    turn = np.arange(5) % apart
    rows = np.random.default_rng(1).standard_normal((rounds, 5)) + 0.5
    found = log_odds(plan, turn, units, rows)
    c = np.append(plan.noise_coefficients, np.zeros(rounds))[:rounds]
    dense = scipy.linalg.toeplitz(c, np.zeros(rounds))
    noise = plan.sum_noise_multiplier * strength(plan)
    law = scipy.stats.binom(units, probability)
    for canary in range(5):
        own = range(turn[canary], rounds, apart)
        ratios = []
        # In every round alike where all is certain: rounds of canaries whose units all take part are not drawn.
        for taken in itertools.product(range(units + 1), repeat=len(own)):
            chance = float(np.prod(law.pmf(taken)))
            if chance == 0:
                continue
            there = np.zeros(rounds)
            there[list(own)] = taken
            mean, seen = dense @ there, dense @ rows[:, canary]
            ratios.append(np.log(chance) + (mean @ seen - mean @ mean / 2) / noise**2)
        assert found[canary] == pytest.approx(float(scipy.special.logsumexp(ratios)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("groups", [3, 13, 49])
def test_who_is_in_every_turn_is_so_whatever_a_quotient_rounds_to(groups: int) -> None:
    plan = plan_of(num_users=1000, sampling=SAMPLINGS.build("none"), sampling_probability=1 / groups)
    assert probability_in_turn(plan) == 1


def test_buffers_share_rows_between_turns() -> None:
    buffers = {"noise_buffers": ((0.4, 0.7),)}
    plan = plan_of(**IN_TURN | {"sampling": SAMPLINGS.build("none"), "sampling_probability": 1 / 3} | buffers)
    rows, turn = np.random.default_rng(2).standard_normal((plan.steps, 3)), np.arange(3)
    assert plan.correlation is not None
    c = np.asarray(plan.correlation.coefficients_of(plan.steps))
    dense = scipy.linalg.toeplitz(c, np.zeros(plan.steps))
    for canary, first in enumerate(turn):
        there = np.zeros(plan.steps)
        there[first::3] = 1
        mean, seen = dense @ there, dense @ rows[:, canary]
        expected = (mean @ seen - mean @ mean / 2) / (plan.noise_multiplier * strength(plan)) ** 2
        assert log_odds(plan, turn, 1, rows)[canary] == pytest.approx(expected)
    assert by_turns(c, 3, plan.steps)[3] == pytest.approx(c[3] + c[0])
