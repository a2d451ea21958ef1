"""Plans: sampling is what the accountant is told, contributions are bounded, and a plan survives the wire."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.errors import InvalidInput
from fedsim.plan import ALGORITHMS, ElsPlan, Plan, UlsPlan, plan_from_json
from fedsim.privacy.events import Adjacency, BinomialMixtureGaussian, PoissonSubsampledGaussian, Repeated

COMMON: dict[str, Any] = {"group_size": 3, "clip_norm": 0.5, "noise_multiplier": 1.5, "steps": 7, "delta": 1e-5}
sizes = st.lists(st.integers(1, 12), min_size=1, max_size=40)
seeds = st.integers(0, 2**62)


def uls(**changes: Any) -> UlsPlan:
    return UlsPlan(**{**COMMON, "num_users": 400, "sampling_probability": 0.1, **changes})


def els(**changes: Any) -> ElsPlan:
    return ElsPlan(**{**COMMON, "num_examples": 400, "sampling_probability": 0.1, **changes})


def view_of(rows_per_user: list[int]) -> Any:
    """What a plan needs of a store: who owns which rows."""
    offsets = np.concatenate([[0], np.cumsum(rows_per_user)]).astype(np.int64)
    return SimpleNamespace(num_users=len(rows_per_user), num_rows=int(offsets[-1]), user_offsets=offsets)


@pytest.mark.parametrize("plan", [uls(), els()])
def test_each_unit_joins_a_round_with_the_planned_probability_and_independently(plan: Plan) -> None:
    rounds = 2000
    joined = np.zeros((rounds, plan.population), dtype=bool)
    for round in range(rounds):
        joined[round, plan.sample(round, seed=5)] = True
    # Each unit's count is Binomial(2000, 0.1), standard deviation 13.4: six of them for the largest of 400.
    counts = joined.sum(axis=0)
    assert np.all(np.abs(counts - 200) < 6 * 13.4)
    assert counts.mean() == pytest.approx(200, rel=0.01)
    # Poisson sampling: the size of a round varies as a binomial does, and two units join together as often as chance.
    assert joined.sum(axis=1).var() == pytest.approx(400 * 0.1 * 0.9, rel=0.15)
    together = (joined[:, :20].T.astype(float) @ joined[:, :20])[np.triu_indices(20, 1)] / rounds
    assert together.mean() == pytest.approx(0.01, rel=0.1)


@given(st.integers(0, 100), seeds)
def test_a_sample_depends_on_round_and_seed_alone(round: int, seed: int) -> None:
    drawn = uls().sample(round, seed)
    np.testing.assert_array_equal(drawn, uls().sample(round, seed))
    assert drawn.dtype == np.int64
    assert np.all(np.diff(drawn) > 0)
    assert len(drawn) == 0 or (drawn[0] >= 0 and drawn[-1] < 400)


@settings(max_examples=60)
@given(sizes, st.integers(1, 5), seeds)
def test_els_keeps_at_most_group_size_examples_of_each_user(rows: list[int], group_size: int, seed: int) -> None:
    view = view_of(rows)
    expected = np.minimum(rows, group_size)
    plan = els(group_size=group_size, num_examples=int(expected.sum()))
    kept = plan.kept_rows(view, seed)
    assert len(np.unique(kept)) == len(kept) == plan.num_examples
    owners = np.searchsorted(view.user_offsets, kept, side="right") - 1
    np.testing.assert_array_equal(np.bincount(owners, minlength=len(rows)), expected)
    np.testing.assert_array_equal(kept, plan.kept_rows(view, seed))


@settings(max_examples=60)
@given(sizes, st.integers(1, 5), seeds, st.integers(0, 50))
def test_uls_draws_at_most_group_size_of_a_users_own_examples(
    rows: list[int], group_size: int, seed: int, round: int
) -> None:
    view = view_of(rows)
    cohort = np.arange(0, len(rows), 2)
    drawn, owner = uls(group_size=group_size).rows_of(view, cohort, round, seed)
    assert len(np.unique(drawn)) == len(drawn)
    np.testing.assert_array_equal(np.searchsorted(view.user_offsets, drawn, side="right") - 1, cohort[owner])
    np.testing.assert_array_equal(
        np.bincount(owner, minlength=len(cohort)), np.minimum(np.take(rows, cohort), group_size)
    )
    # A user draws the same rows whoever else is in the cohort.
    alone, _ = uls(group_size=group_size).rows_of(view, cohort[:1], round, seed)
    np.testing.assert_array_equal(np.sort(alone), np.sort(drawn[owner == 0]))


def test_the_event_is_the_one_of_the_sampling_that_is_done() -> None:
    assert uls().event() == Repeated(
        event=PoissonSubsampledGaussian(sampling_probability=0.1, noise_multiplier=1.5), count=7
    )
    assert els().event() == Repeated(
        event=BinomialMixtureGaussian(group_size=3, sampling_probability=0.1, noise_multiplier=1.5), count=7
    )


def test_public_constants_never_follow_the_realised_cohort() -> None:
    assert uls().normaliser == els().normaliser == pytest.approx(40)
    assert uls().noise_std == pytest.approx(0.75)
    assert uls().gradients_per_round == pytest.approx(120)
    assert els().gradients_per_round == pytest.approx(40)


@given(st.integers(1, 20))
def test_a_users_units_share_out_the_rows_it_may_give(owned: int) -> None:
    for plan in (uls(), els()):
        assert plan.rows_per_unit(owned) * plan.units_per_user(owned) == min(plan.group_size, owned)
    assert uls().units_per_user(owned) == els().rows_per_unit(owned) == 1


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_draft_spends_the_compute_or_refuses(name: str) -> None:
    users = SimpleNamespace(num_users=10, several_owners=False, kept=lambda group_size: 10 * min(group_size, 4))
    common = {key: value for key, value in COMMON.items() if key != "group_size"}
    draft = ALGORITHMS[name].draft(users, gradients_per_round=20, group_size=2, **common)
    assert (draft.name, draft.gradients_per_round, draft.sampling_probability) == (name, 20, 1)
    with pytest.raises(InvalidInput) as caught:
        ALGORITHMS[name].draft(users, gradients_per_round=20.1, group_size=2, **common)
    assert caught.value.field == "plan.gradients-per-round"
    with pytest.raises(InvalidInput) as caught:
        ALGORITHMS[name].draft(users, gradients_per_round=20, group_size=0, **common)
    assert caught.value.field == "plan.group-size"


@pytest.mark.parametrize("plan", [uls(adjacency=Adjacency.REPLACE_ONE_USER, local_steps=3), els(selection="longest")])
def test_a_plan_survives_the_wire(plan: Plan) -> None:
    assert plan_from_json(plan.to_json()) == plan


@pytest.mark.parametrize("plan", [uls(), els()])
def test_calibration_meets_the_target_from_below_and_changes_nothing_else(plan: Plan) -> None:
    calibrated = plan.calibrate(2.0)
    assert 1.98 < calibrated.epsilon().upper <= 2.0
    assert calibrated.clip_norm == plan.clip_norm
    assert plan.noise_multiplier == 1.5
    assert calibrated.epsilon(3).upper < calibrated.epsilon().upper
    assert plan.calibrate(math.inf).noise_multiplier == 0


@pytest.mark.parametrize(
    ("make", "changes", "field"),
    [
        (uls, {"sampling_probability": 1.5}, "plan.gradients-per-round"),
        (uls, {"sampling_probability": 0.0}, "sampling_probability"),
        (uls, {"num_users": 0}, "num_users"),
        (uls, {"local_steps": 0}, "plan.local-steps"),
        (els, {"group_size": 0}, "plan.group-size"),
        (els, {"delta": 1.0}, "plan.delta"),
        (els, {"clip_norm": math.nan}, "plan.clip-norm"),
        (els, {"noise_multiplier": -1.0}, "plan.noise-multiplier"),
    ],
)
def test_impossible_plans_are_refused(make: Any, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        make(**changes)
    assert caught.value.field == field


def test_an_unknown_algorithm_is_named() -> None:
    with pytest.raises(InvalidInput, match="fedprox"):
        plan_from_json(uls().to_json().replace('"uls"', '"fedprox"'))
