"""Releases to groups of users: what each user goes through is bounded, by brute force over who is in which group."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.errors import InvalidInput
from fedsim.plan import ElsPlan, Plan, UlsPlan
from fedsim.privacy.accountant import (
    Accountant,
    delta_bounds,
    delta_bounds_at,
    epsilon_against,
    epsilon_bounds,
    flatten,
)
from fedsim.privacy.cases import MOST_CASES, cases_of
from fedsim.privacy.check import Verdict, charged, confirm, counted
from fedsim.privacy.events import (
    Adjacency,
    Composed,
    Event,
    Gaussian,
    OfGroup,
    OneOf,
    PoissonSubsampledGaussian,
    Repeated,
    from_json,
    to_json,
)
from fedsim.privacy.ledger import Ledger, merged, read_entries
from fedsim.sampling import CyclicPoisson

STEP = PoissonSubsampledGaussian(sampling_probability=0.3, noise_multiplier=2.0)
QUIET, LOUD = Gaussian(noise_multiplier=2.0), Gaussian(noise_multiplier=8.0)
DELTA = 1e-5


def plan_of(algorithm: str, groups: int, rounds: int) -> Plan:
    common: dict[str, Any] = {
        "sampling_probability": 0.05,
        "group_size": 2,
        "clip_norm": 1.0,
        "noise_multiplier": 2.0,
        "steps": rounds,
        "delta": DELTA,
        "sampling": CyclicPoisson(groups=groups),
        "noise_coefficients": (1.0, 0.5)[:groups],
    }
    return UlsPlan(num_users=100, **common) if algorithm == "uls" else ElsPlan(num_examples=100, **common)


@pytest.mark.parametrize(("groups", "rounds"), [(1, 5), (2, 6), (2, 7), (3, 7), (5, 3)])
@pytest.mark.parametrize("algorithm", ["uls", "els"])
def test_rounds_of_groups_cost_the_turns_of_the_first_group(algorithm: str, groups: int, rounds: int) -> None:
    plan = plan_of(algorithm, groups, rounds)
    turns = -(-rounds // groups)
    assert plan.event() == Repeated(event=plan.step_event(), count=turns)
    assert plan.step_event().sampling_probability == pytest.approx(groups * 0.05)  # type: ignore[attr-defined]
    for sofar in range(rounds + 1):
        together = merged(plan.charge(t) for t in range(sofar))
        assert flatten(together) == flatten(plan.event(sofar))
        assert epsilon_bounds(together, DELTA) == epsilon_bounds(plan.event(sofar), DELTA)
    if groups > 1:
        assert plan.charge(groups + 1) == OfGroup(event=plan.step_event(), group=1, groups=groups)


def test_independent_partitions_cost_the_sum_of_their_worst() -> None:
    halves = [OfGroup(event=STEP, group=t % 2, groups=2) for t in range(5)]
    thirds = [OfGroup(event=STEP, group=t % 3, groups=3) for t in range(4)]
    together = merged([*halves, *thirds, STEP])
    assert flatten(together) == Counter({STEP: 3 + 2 + 1})
    assert cases_of(together) == cases_of(together, least=True) == [Counter({STEP: 3 + 2 + 1})]
    # Ledgers of two runs, each with an assignment of its own.
    runs = Composed(events=(merged(halves), merged(halves)))
    assert flatten(merged([runs])) == Counter({STEP: 6})
    assert flatten(Repeated(event=merged(halves), count=2)) == Counter({STEP: 6})
    assert flatten(halves[0]) == Counter({STEP: 1})


def test_users_of_different_events_are_bounded_from_both_sides() -> None:
    loud_mostly = Composed(events=(Repeated(event=LOUD, count=4), Repeated(event=QUIET, count=1)))
    quiet_mostly = Composed(events=(Repeated(event=LOUD, count=1), Repeated(event=QUIET, count=3)))
    both = OneOf(events=(loud_mostly, quiet_mostly))
    assert flatten(both) == Counter({LOUD: 4, QUIET: 3})
    assert cases_of(both) == cases_of(both, least=True) == [Counter({LOUD: 4, QUIET: 1}), Counter({LOUD: 1, QUIET: 3})]
    true = [epsilon_bounds(one, DELTA) for one in both.events]
    found = epsilon_bounds(both, DELTA)
    assert (found.lower, found.upper) == (max(one.lower for one in true), max(one.upper for one in true))
    delta = delta_bounds(both, 1.0)
    lower, upper = delta_bounds_at(both, np.array([1.0]))
    for low, high in ((delta.lower, delta.upper), (lower[0], upper[0])):
        each = [delta_bounds(one, 1.0) for one in both.events]
        assert low == pytest.approx(max(one.lower for one in each))
        assert high == pytest.approx(max(one.upper for one in each))


def test_too_many_kinds_of_users_are_taken_together() -> None:
    kinds = [Composed(events=(Repeated(event=LOUD, count=n), Repeated(event=QUIET, count=9 - n))) for n in range(10)]
    many = OneOf(events=tuple(kinds))
    assert len(kinds) > MOST_CASES
    assert cases_of(many) == [Counter({LOUD: 9, QUIET: 9})]
    assert [case.total() for case in cases_of(many, least=True)] == [9]
    found, true = epsilon_bounds(many, DELTA), max(epsilon_bounds(one, DELTA).upper for one in kinds)
    assert found.lower <= true < found.upper


CHARGES = st.lists(
    st.tuples(st.sampled_from([QUIET, LOUD, STEP]), st.sampled_from([1, 2, 3]), st.integers(0, 2)), max_size=12
).map(
    lambda drawn: [
        event if groups == 1 else OfGroup(event=event, group=place % groups, groups=groups)
        for event, groups, place in drawn
    ]
)


@settings(max_examples=60)
@given(charges=CHARGES)
def test_nobody_goes_through_more_than_is_counted_and_somebody_through_as_much_as_the_least(
    charges: list[Event],
) -> None:
    users = [
        Counter(
            one.event if isinstance(one, OfGroup) else one
            for one in charges
            if not isinstance(one, OfGroup) or one.group == {2: half, 3: third}[one.groups]
        )
        for half, third in itertools.product(range(2), range(3))
    ]
    together = merged(charges)
    most = flatten(together)
    assert all(count == max(user[event] for user in users) for event, count in most.items())
    cases = cases_of(together)
    assert all(any(user <= case for case in cases) for user in users)
    assert all(any(case == user for user in users) for case in cases_of(together, least=True))
    assert cases == cases_of(together, least=True)
    # The second method looks at each kind of user by itself.
    kinds = {frozenset((+case).items()) for case in charged(charges)}
    assert kinds <= {frozenset((+user).items()) for user in users} | {frozenset()}
    assert {frozenset((+case).items()) for case in counted(together)} == kinds
    assert merged([together]) == together
    assert flatten(merged([together, *charges])) == flatten(Composed(events=(together, together)))


@pytest.mark.parametrize(
    "ask",
    [
        lambda event, adjacency: epsilon_bounds(event, DELTA, adjacency=adjacency),
        lambda event, adjacency: delta_bounds(event, 1.0, adjacency=adjacency),
        lambda event, adjacency: delta_bounds_at(event, np.array([1.0]), adjacency=adjacency),
        lambda event, adjacency: epsilon_against(event, DELTA, 1.0, adjacency=adjacency, tolerance=0.1),
        lambda event, adjacency: Accountant(adjacency=adjacency).compose(event),
    ],
)
def test_groups_of_users_who_may_be_replaced_are_refused(ask: Callable[[Event, Adjacency], object]) -> None:
    of_group = OfGroup(event=QUIET, group=0, groups=2)
    nested = Repeated(event=Composed(events=(QUIET, OneOf(events=(QUIET, LOUD)))), count=2)
    for event in (of_group, OneOf(events=(QUIET,)), nested, merged([of_group])):
        with pytest.raises(InvalidInput, match="adjacency"):
            ask(event, Adjacency.REPLACE_ONE_USER)
        ask(event, Adjacency.ADD_OR_REMOVE_ONE_USER)
    ask(Composed(events=(QUIET,)), Adjacency.REPLACE_ONE_USER)


@pytest.mark.parametrize("algorithm", ["uls", "els"])
def test_a_ledger_with_groups_comes_back_and_a_second_method_confirms_it(algorithm: str, tmp_path: Path) -> None:
    plan = plan_of(algorithm, 2, 7)
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        for t in range(7):
            ledger.charge(plan.charge(t), round=t)
        ledger.charge(plan.charge(5), round=5)
        found = ledger.epsilon(DELTA)
    entries = read_entries(tmp_path / "ledger.jsonl")
    events = [entry.event for entry in entries]
    assert events == [plan.charge(t) for t in (0, 1, 2, 3, 4, 5, 6, 5)]
    with Ledger.open(tmp_path / "ledger.jsonl") as again:
        assert again.event() == merged(events)
        assert again.epsilon(DELTA) == found == epsilon_bounds(plan.event(8), DELTA)
    for what in (merged(events), charged(events)):
        assert confirm(what, DELTA, (found.lower, found.upper)).verdict is Verdict.CONFIRMED
        assert confirm(what, DELTA, (found.lower, 0.97 * found.lower)).verdict is Verdict.CONTRADICTED
    assert from_json(to_json(merged(events))) == merged(events)


@pytest.mark.parametrize(("group", "groups"), [(2, 2), (-1, 2), (0, 0)])
def test_groups_that_there_are_not_are_refused(group: int, groups: int) -> None:
    with pytest.raises(InvalidInput, match="group"):
        OfGroup(event=QUIET, group=group, groups=groups)
    with pytest.raises(InvalidInput, match="events"):
        OneOf(events=())
