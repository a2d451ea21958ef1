"""What is released of held-out users: how far one of them reaches, and the law of the noise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedsim.config import EvaluationConfig, PlanConfig, RunConfig
from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import Adjacency, Composed, Gaussian, Repeated
from fedsim.privacy.held_out import PrivateEvaluation, evaluations_of
from fedsim.randomness import StreamNoise
from fedsim.secure_noise import SecureNoise

DOCUMENTED = PrivateEvaluation(noise_multiplier=10.0, clip_norm=2.0, count=20, users=1000)


class NoNoise:
    """Of this evaluation, told of its standard deviation alone."""

    def __init__(self) -> None:
        self.std = 0.0

    def add_normal(self, total: np.ndarray, std: float) -> None:
        self.std = std

    def generator(self) -> np.random.Generator:
        raise AssertionError("only Gaussian noise is added")


def total(evaluation: PrivateEvaluation, changes: list[float]) -> float:
    return evaluation.release(np.array(changes), NoNoise()) * evaluation.users


CHANGES = st.floats(allow_nan=True, allow_infinity=True)
CLIPS = st.floats(1e-3, 50.0)


@settings(max_examples=300)
@given(others=st.lists(CHANGES, max_size=8), one=CHANGES, another=CHANGES, clip=CLIPS, users=st.integers(1, 9))
def test_a_user_moves_the_sum_by_the_clip_norm_at_most_whoever_else_there_is(
    others: list[float], one: float, another: float, clip: float, users: int
) -> None:
    evaluation = PrivateEvaluation(noise_multiplier=1.0, clip_norm=clip, count=1, users=users)
    without, having, replaced = (total(evaluation, [*others, *more]) for more in ([], [one], [another]))
    slack = 1e-12 * clip * (len(others) + 2)  # of dividing by users, and back
    assert abs(having - without) <= clip + slack
    assert abs(having - replaced) <= 2 * clip + slack
    alone = evaluation.clipped(np.array([one]))
    together = evaluation.clipped(np.array([*others, one]))
    assert together[-1] == alone[0]
    assert abs(alone[0]) <= clip
    assert np.array_equal(alone / evaluation.resolution, np.rint(alone / evaluation.resolution))


def test_a_loss_that_is_no_number_counts_as_the_worst() -> None:
    clipped = DOCUMENTED.clipped(np.array([math.nan, math.inf, -math.inf, 3.0, -3.0, 0.5]))
    np.testing.assert_array_equal(clipped, [2, 2, 2, 2, -2, 0.5])


@pytest.mark.parametrize("secure", [False, True])
def test_the_noise_is_normal_of_the_noise_multiplier_times_the_clip_norm(secure: bool) -> None:
    changes = np.full(500, -0.25)
    source = SecureNoise(DOCUMENTED.resolution) if secure else None
    found = [
        DOCUMENTED.release(changes, source or StreamNoise(7, "private evaluation", draw, 0)) for draw in range(2000)
    ]
    assert DOCUMENTED.standard_deviation == 0.02
    assert stats.kstest(found, stats.norm(-0.125, 0.02).cdf).pvalue > 1e-3
    told = NoNoise()
    DOCUMENTED.release(changes, told)
    assert told.std == 20.0


def test_the_documented_evaluations_cost_what_is_said() -> None:
    assert DOCUMENTED.event == Repeated(event=Gaussian(noise_multiplier=10.0), count=20)
    assert epsilon_bounds(DOCUMENTED.event, 1e-5).upper <= 1.761


@pytest.mark.parametrize("adjacency", [Adjacency.ADD_OR_REMOVE_ONE_USER, Adjacency.REPLACE_ONE_USER])
def test_the_noise_is_the_least_that_all_evaluations_together_need(adjacency: Adjacency) -> None:
    values = {"delta": 1e-5, "count": 7, "clip_norm": 0.5, "users": 40, "adjacency": adjacency}
    found = PrivateEvaluation.calibrated(epsilon=1.5, **values)
    bounds = epsilon_bounds(found.event, 1e-5, adjacency=adjacency)
    assert 1.5 * 0.999 < bounds.upper <= 1.5
    assert PrivateEvaluation(**found.to_values()) == found


@given(rounds=st.integers(1, 60), every=st.integers(1, 70))
def test_no_run_has_more_evaluations_than_were_calibrated_for(rounds: int, every: int) -> None:
    for done in range(1, rounds + 1):
        measured = {number for number in range(1, done + 1) if number % every == 0} | {done}
        assert len(measured) <= evaluations_of(rounds, every)
    assert len({number for number in range(1, rounds + 1) if number % every == 0} | {rounds}) == evaluations_of(
        rounds, every
    )


@given(users=st.integers(1, 5000), max_rows=st.integers(1, 5000))
def test_as_many_users_are_measured_as_rows_are_allowed(users: int, max_rows: int) -> None:
    expected, rows = EvaluationConfig(max_rows=max_rows).measured(users)
    assert expected == min(users, max_rows)
    assert rows >= 1
    assert expected * rows <= max_rows


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (lambda: EvaluationConfig(private_epsilon=1.0), "evaluation.private-epsilon"),
        (lambda: EvaluationConfig(private_clip=1.0), "evaluation.private-clip"),
        (lambda: EvaluationConfig(private=True, private_clip=0.0), "evaluation.private-clip"),
        (lambda: private(adjacency="replace-one-user"), "plan.adjacency"),
        (lambda: private(epsilon=math.inf, allow_no_privacy=True), "evaluation.private"),
        (lambda: private(noise_multiplier=0.0, allow_no_privacy=True, epsilon=math.inf), "evaluation.private"),
        (lambda: private(epsilon=1.0), "evaluation.private-epsilon"),
        (lambda: private().private_evaluation(0), "evaluation.private"),
        (
            lambda: private(epsilon=2.0).private_evaluation(50, Gaussian(noise_multiplier=5.0)),
            "evaluation.private-epsilon",
        ),
    ],
)
def test_what_does_nothing_or_has_no_room_is_refused(config, field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        config()
    assert refused.value.field == field


def private(**plan) -> RunConfig:
    return RunConfig(plan=PlanConfig(**plan), evaluation=EvaluationConfig(private=True))


def test_earlier_runs_leave_what_they_leave() -> None:
    before = Composed(events=(Gaussian(noise_multiplier=5.0),))
    found = private().private_evaluation(50, before)
    assert found is not None
    assert found.users == found.population == 50
    many = private().private_evaluation(3000, before)
    assert many is not None
    assert (many.users, many.population) == (EvaluationConfig().max_rows, 3000)
    assert found.count == evaluations_of(private().plan.rounds, 4)
    assert RunConfig().private_evaluation(50) is None
