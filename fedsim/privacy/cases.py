"""Who goes through which releases, where each user is in one of several: the worst of them bounds all."""

import functools
import operator
from collections import Counter
from collections.abc import Iterable, Sequence

from fedsim.privacy.events import Composed, Event, OfBlock, OfGroup, OneOf, Repeated
from fedsim.privacy.splits import OfSplit

Cases = list[Counter[Event]]
"""What users go through: single releases and how often each occurs, a count for each kind of user."""
MOST_CASES = 8
"""Kinds of users that are told apart."""


def cases_of(event: Event, *, least: bool = False) -> Cases:
    """What users go through who are in different ones of the alternatives within an event; nobody who goes through no
    more than others do.

    Args:
        event: The event.
        least: Where kinds of users are too many to be told apart, take the one of most releases: some user goes
            through that much. By default take as many of every kind as any of them has, which nobody exceeds.
    """
    if isinstance(event, Repeated):
        found = cases_of(event.event, least=least)
        if len(found) > 1 and event.count <= MOST_CASES:  # a user may be in another of the alternatives each time
            return cases_of(Composed(events=(event.event,) * event.count), least=least)
        single = found[0] if len(found) == 1 else _one_for_all(found, least=least)
        return [Counter({one: count * event.count for one, count in single.items()})]
    if isinstance(event, Composed):
        composed: Cases = [Counter()]
        for inner in event.events:
            composed = together(composed, cases_of(inner, least=least), least=least)
        return composed
    if isinstance(event, OneOf):
        return _told_apart((case for one in event.events for case in cases_of(one, least=least)), least=least)
    if isinstance(event, OfGroup | OfBlock | OfSplit):
        return cases_of(event.event, least=least)
    return [Counter({event: 1})]


def together(cases: Cases, others: Cases, *, least: bool) -> Cases:
    """Those of users who are in any of the cases, and in any of the others."""
    return _told_apart((case + other for case in cases for other in others), least=least)


def _told_apart(cases: Iterable[Counter[Event]], *, least: bool) -> Cases:
    """The cases that are within no other; one for all of them where they are too many."""
    kept: Cases = []
    for case in cases:
        if not any(case <= other for other in kept):
            kept = [*(other for other in kept if not other <= case), case]
    return kept if len(kept) <= MOST_CASES else [_one_for_all(kept, least=least)]


def _one_for_all(cases: Sequence[Counter[Event]], *, least: bool) -> Counter[Event]:
    return max(cases, key=Counter.total) if least else functools.reduce(operator.or_, cases)
