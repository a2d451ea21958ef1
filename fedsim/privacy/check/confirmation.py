"""Whether bounds on ε hold, asked of a second method: on which side of the named δ does its δ at each bound lie."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

from fedsim.privacy.check.contour import CheckedDelta, Laws, delta_at
from fedsim.privacy.check.loss_laws import loss_law
from fedsim.privacy.check.selection import best_of_delta, selection_of
from fedsim.privacy.events import Adjacency, Composed, Event, OfBlock, OfGroup, OneOf, Repeated
from fedsim.privacy.splits import OfSplit
from fedsim.validation import require_at_least, require_between

BLUR = 1e-6
"""Relative difference from δ below which the check does not say on which side a value lies, and takes it as equal."""


class Verdict(Enum):
    """What the check found of a bound."""

    CONFIRMED = "confirmed"
    CONTRADICTED = "contradicted"
    UNDECIDED = "cannot tell"


@dataclass(frozen=True, kw_only=True)
class BoundCheck:
    """One bound on ε.

    Attributes:
        epsilon: The bound.
        delta: δ there by the second method, the larger of both directions; None where nothing had to be computed: an ε
            is at least 0 and at most ∞ in any case.
        error: How far that δ may be off, absolute: a numerical estimate, not certified.
        verdict: Whether the bound holds.
    """

    epsilon: float
    delta: float | None
    error: float
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """What a second method says of [lower, upper] at δ. Evidence of the kind "check": it certifies nothing by itself.

    Attributes:
        lower, upper: Each bound.
        seconds: Time that it took.
    """

    lower: BoundCheck
    upper: BoundCheck
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """Of both bounds together."""
        verdicts = {self.lower.verdict, self.upper.verdict}
        if Verdict.CONTRADICTED in verdicts:
            return Verdict.CONTRADICTED
        return Verdict.UNDECIDED if Verdict.UNDECIDED in verdicts else Verdict.CONFIRMED


def confirm(
    event: Event | Sequence[Counter[Event]],
    delta: float,
    bounds: tuple[float, float],
    adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER,
) -> Confirmation:
    """Check lower ≤ ε ≤ upper at delta: δ(upper) must be at most delta, δ(lower) at least.

    Args:
        event: What was released; or what users went through, as counted() or charged() tell it.
        delta: δ at which the bounds are claimed, above 0 and below 1.
        bounds: (lower, upper); an upper bound of ∞ claims nothing.
        adjacency: The change of the data set that must stay hidden.

    Raises:
        NotCheckable: When a kind of event is not known to the second method.
        InvalidInput: For a δ outside (0, 1), or a lower bound that is negative.
    """
    require_between("delta", delta, 0, 1)
    lower, upper = bounds
    require_at_least("lower", lower, 0)
    require_at_least("upper", min(upper, 1e300), 0)
    start = time.perf_counter()
    cases = counted(event) if isinstance(event, Event) else event
    deltas = [_delta_of(case, adjacency) for case in cases]
    above = BoundCheck(epsilon=upper, delta=None, error=0.0, verdict=Verdict.CONFIRMED)
    if math.isfinite(upper):
        found = _largest([above_of(upper) for above_of, _ in deltas])
        above = BoundCheck(epsilon=upper, delta=found.value, error=found.error, verdict=_side(delta, found, 1))
    below = BoundCheck(epsilon=lower, delta=None, error=0.0, verdict=Verdict.CONFIRMED)
    if lower > 0:
        found = _largest([below_of(lower) for _, below_of in deltas])
        below = BoundCheck(epsilon=lower, delta=found.value, error=found.error, verdict=_side(delta, found, -1))
    return Confirmation(lower=below, upper=above, seconds=time.perf_counter() - start)


def larger_delta(laws: Laws, epsilon: float) -> CheckedDelta:
    """δ at ε: the larger of both directions."""
    if not laws:
        return CheckedDelta(0.0, 0.0)
    found = [delta_at(laws, epsilon, "remove")]
    if not all(law.symmetric for law, _ in laws):
        found.append(delta_at(laws, epsilon, "add"))
    value = max(one.value for one in found)
    return CheckedDelta(value, max(one.value + one.error for one in found) - value)


DeltaAt = Callable[[float], CheckedDelta]


def _delta_of(case: Counter[Event], adjacency: Adjacency) -> tuple[DeltaAt, DeltaAt]:
    """δ of one case at an ε: what bounds it from above, and from below. They differ for a selection alone, whose score
    is any part of a run's outcome: from above by the theorem, from below by a score that tells nothing."""
    if (selection := selection_of(case)) is None:
        laws = [(loss_law(one, adjacency.accounted_as), count) for one, count in case.items() if count]
        alone = partial(larger_delta, laws)
        return alone, alone
    runs = [_delta_of(one, adjacency)[0] for event in selection.events for one in counted(event)]

    def of_run(epsilon: float) -> CheckedDelta:
        return _largest([delta(epsilon) for delta in runs])

    return (lambda epsilon: best_of_delta(selection, epsilon, of_run)), of_run


def _largest(found: Sequence[CheckedDelta]) -> CheckedDelta:
    """δ of the users who go through most."""
    value = max(one.value for one in found)
    return CheckedDelta(value, max(one.value + one.error for one in found) - value)


def counted(event: Event) -> list[Counter[Event]]:
    """What users go through: each single release, and how often it occurs; one count for each kind of user.

    Users differ where each is in one of several events alone.
    """
    if isinstance(event, Repeated):
        cases = counted(event.event)
        if len(cases) > 1:  # a user may be in another of the alternatives each time
            return counted(Composed(events=(event.event,) * event.count))
        return [Counter({one: count * event.count for one, count in case.items()}) for case in cases]
    if isinstance(event, Composed):
        cases = [Counter[Event]()]
        for part in event.events:
            cases = _different(before + more for before in cases for more in counted(part))
        return cases
    if isinstance(event, OneOf):
        return _different(case for part in event.events for case in counted(part))
    if isinstance(event, OfGroup | OfBlock | OfSplit):
        return counted(event.event)
    return [Counter({event: 1})]


def charged(events: Iterable[Event]) -> list[Counter[Event]]:
    """What users went through, by the charges of one ledger.

    All releases to groups are of one assignment, all rounds of a block are one release of it, and all releases to
    training or held-out users are of one split.
    """
    of_all: Counter[Event] = Counter()
    blocks: set[Event] = set()
    of_groups: dict[int, dict[int, Counter[Event]]] = {}
    of_splits: dict[str, list[Event]] = {}
    for event in events:
        if isinstance(event, OfSplit):
            of_splits.setdefault(event.split, []).append(event.event)
        elif isinstance(event, OfGroup):
            of_groups.setdefault(event.groups, {}).setdefault(event.group, Counter()).update([event.event])
        elif not isinstance(event, OfBlock):
            of_all.update([event])
        elif event not in blocks:
            of_all.update([event.event])
            blocks.add(event)
    cases = counted(Composed(events=tuple(Repeated(event=event, count=count) for event, count in of_all.items())))
    for groups in of_groups.values():
        cases = _different(before + group for before in cases for group in groups.values())
    if of_splits:
        each = [case for split in of_splits.values() for case in charged(split)]
        cases = _different(before + more for before in cases for more in each)
    return cases


def _different(cases: Iterable[Counter[Event]]) -> list[Counter[Event]]:
    return list({frozenset(case.items()): case for case in cases}.values())


def _side(delta: float, found: CheckedDelta, sign: int) -> Verdict:
    """Confirmed where sign · (found − delta) ≤ 0, as far as the check can see."""
    excess = sign * (found.value - delta)
    if excess + found.error <= BLUR * delta:
        return Verdict.CONFIRMED
    return Verdict.CONTRADICTED if excess - found.error > BLUR * delta else Verdict.UNDECIDED
