"""Releases to training users and to held-out users: each user pays for their own split alone, and for all before."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.check import Verdict, charged, confirm, counted
from fedsim.privacy.earlier import SAME_PEOPLE, own_event
from fedsim.privacy.events import (
    Adjacency,
    Composed,
    Event,
    Gaussian,
    OfGroup,
    PoissonSubsampledGaussian,
    Repeated,
    from_json,
    to_json,
)
from fedsim.privacy.ledger import LedgerEntry, merged
from fedsim.privacy.splits import HELD_OUT, TRAINING, OfSplit, of_split

DELTA = 1e-5
STEP = PoissonSubsampledGaussian(sampling_probability=0.1, noise_multiplier=1.0)
MEASURED = Gaussian(noise_multiplier=10.0)
BEFORE = Gaussian(noise_multiplier=4.0)


def charges(steps: int, evaluations: int) -> list[Event]:
    return [OfSplit(event=STEP, split=TRAINING)] * steps + [OfSplit(event=MEASURED, split=HELD_OUT)] * evaluations


def upper(event: Event) -> float:
    return epsilon_bounds(event, DELTA).upper


@pytest.mark.parametrize(("steps", "evaluations"), [(20, 20), (2, 60), (0, 5), (5, 0)])
def test_a_user_pays_the_larger_of_both_and_not_the_sum(steps: int, evaluations: int) -> None:
    training, held_out = Repeated(event=STEP, count=steps), Repeated(event=MEASURED, count=evaluations)
    together = epsilon_bounds(merged(charges(steps, evaluations)), DELTA)
    assert together.upper == max(upper(training), upper(held_out))
    assert together.lower == max(epsilon_bounds(one, DELTA).lower for one in (training, held_out))
    if steps and evaluations:
        assert together.upper < upper(Composed(events=(training, held_out)))


def test_what_came_before_is_charged_to_both() -> None:
    both = merged([BEFORE, *charges(20, 40)])
    for split, event in ((TRAINING, Repeated(event=STEP, count=20)), (HELD_OUT, Repeated(event=MEASURED, count=40))):
        assert upper(both) >= upper(Composed(events=(BEFORE, event))), split
    # A run that went on from one with held-out users: who was held out there may be trained on here.
    twice = Composed(events=(merged(charges(20, 40)), merged(charges(20, 40))))
    mixed = Composed(events=(Repeated(event=STEP, count=20), Repeated(event=MEASURED, count=40)))
    assert upper(twice) >= max(upper(mixed), upper(Repeated(event=STEP, count=40)))
    entries = [LedgerEntry(round=0, purpose=SAME_PEOPLE, event=merged(charges(20, 40)), note="{}")]
    entries += [LedgerEntry(round=0, purpose="release", event=event) for event in charges(20, 40)]
    assert upper(merged(entry.event for entry in entries)) == upper(twice)
    assert counted(own_event(entries)) == counted(merged(charges(20, 40)))


@settings(max_examples=60)
@given(
    lines=st.lists(
        st.tuples(
            st.sampled_from(["all", TRAINING, HELD_OUT]), st.sampled_from([STEP, MEASURED, BEFORE]), st.integers(0, 2)
        ),
        max_size=10,
    )
)
def test_each_split_goes_through_its_own_lines(lines: list[tuple[str, Event, int]]) -> None:
    """Brute force over what a user may be; the first two of three are groups of users that take turns."""
    events: list[Event] = []
    for split, event, group in lines:
        inner = OfGroup(event=event, group=group, groups=2) if group < 2 and split != HELD_OUT else event
        events.append(inner if split == "all" else OfSplit(event=inner, split=split))
    users = [
        Counter(
            event
            for split, event, of in lines
            if split in ("all", own) and (of == 2 or split == HELD_OUT or of == (common if split == "all" else group))
        )
        for own in (TRAINING, HELD_OUT)
        for common in range(2)
        for group in range(2)
    ]
    together = merged(events)
    kinds = {frozenset((+case).items()) for case in charged(events)}
    assert kinds <= {frozenset(user.items()) for user in users} | {frozenset()}
    assert kinds == {frozenset((+case).items()) for case in counted(together)}
    assert all(any(user <= case for case in charged(events)) for user in users)
    assert merged([together]) == together
    assert from_json(to_json(together)) == together
    for split in (TRAINING, HELD_OUT):
        mine = [event for event in events if not isinstance(event, OfSplit) or event.split == split]
        plain = [event.event if isinstance(event, OfSplit) else event for event in mine]
        of_own = {frozenset((+case).items()) for case in counted(of_split(merged(mine), split))}
        assert of_own == {frozenset((+case).items()) for case in counted(of_split(together, split))}
        assert upper(merged(mine)) <= upper(together), plain


def test_the_second_method_confirms_both_and_sees_what_is_understated() -> None:
    together = merged(charges(1, 20))
    bounds = epsilon_bounds(together, DELTA)
    assert bounds.upper == upper(Repeated(event=MEASURED, count=20)) == pytest.approx(1.7600571, abs=1e-6)
    assert confirm(together, DELTA, (bounds.lower, bounds.upper)).verdict is Verdict.CONFIRMED
    training = upper(STEP)
    assert confirm(together, DELTA, (0.0, training)).verdict is Verdict.CONTRADICTED


def test_who_is_replaced_may_be_of_the_other_split() -> None:
    for event in (charges(1, 0)[0], merged(charges(1, 1))):
        with pytest.raises(InvalidInput, match="adjacency"):
            epsilon_bounds(event, DELTA, adjacency=Adjacency.REPLACE_ONE_USER)
    with pytest.raises(InvalidInput, match="split"):
        OfSplit(event=STEP, split="both")
