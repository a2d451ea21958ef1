"""What a run may still spend."""

import math
from collections import Counter
from typing import Any, Protocol

from fedsim.errors import Failure, InvalidInput
from fedsim.plan import Plan
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import Composed, Event
from fedsim.privacy.ledger import MODEL_UPDATE, LedgerEntry, merged
from fedsim.privacy.splits import HELD_OUT, TRAINING, OfSplit


class Charges(Protocol):
    """Where rounds are charged: a ledger, or a list in memory where nothing is released to anybody."""

    @property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """All charges, in order."""

    def __len__(self) -> int:
        """How many."""

    def charge(self, event: Event, *, round: int, purpose: str = MODEL_UPDATE, note: str = "") -> object:
        """Write down a release that is about to happen, or a note at no charge."""

    def event(self) -> Composed:
        """Everything charged so far."""


class Budget:
    """What a run may still spend: charged before each release, and never exceeded.

    Args:
        plan: Gives the event of one round, δ and adjacency.
        ledger: Where charges are written; what it holds already counts as spent.
        limit: User-level ε that the run must not exceed; inf for a run without privacy, which charges nothing.
        splits: Whether the ledger tells of training users apart, because others are charged for evaluations.
    """

    def __init__(self, plan: Plan, ledger: Charges, limit: float, *, splits: bool = False) -> None:
        self.ledger = ledger
        self.limit = limit
        self._plan, self._splits = plan, splits
        self._private = plan.noise_multiplier > 0
        self._known: dict[tuple[int, tuple[Event, ...]], float] = {}
        self._attempts = Counter(entry.round for entry in ledger.entries if entry.purpose == MODEL_UPDATE)

    def epsilon(self) -> float:
        """Certified upper bound on the ε spent so far, by whoever spent most."""
        return self._after()

    def affords(self, round: int) -> bool:
        """Whether a round stays within the limit."""
        return not self._private or self._after(self._charge(round)) <= self.limit

    def attempts(self, round: int) -> int:
        """How often a round was begun so far."""
        return self._attempts[round]

    def charge(self, round: int) -> None:
        """Write the charge of a round to disk; it returns once the charge would survive a crash."""
        if self._private:
            self.ledger.charge(self._charge(round), round=round)
        self._attempts[round] += 1

    def _charge(self, round: int) -> Event:
        event = self._plan.charge(round, self.attempts(round))
        return OfSplit(event=event, split=TRAINING) if self._splits else event

    def _after(self, *more: Event) -> float:
        """Upper bound on ε once more has been charged, which is spent by training users: held-out ones do not count
        then."""
        if not self._private:
            return math.inf
        known = (len(self.ledger), more)
        if known not in self._known:
            charged = [entry.event for entry in self.ledger.entries if not (more and _of_held_out(entry.event))]
            event = merged((*charged, *more))
            self._known = {known: epsilon_bounds(event, self._plan.delta, adjacency=self._plan.adjacency).upper}
        return self._known[known]


class NothingTrained(Failure):
    """A run that can begin no round, and has no state of earlier ones: its model would be the one that was loaded.

    Attributes:
        charges: How many the ledger holds.
        epsilon: ε of them.
        limit: What may be spent.
    """

    def __init__(self, charges: int, epsilon: float, limit: float) -> None:
        self.charges, self.epsilon, self.limit = charges, epsilon, limit
        spent = f"no state is kept of what {charges} charges were spent on (ε = {epsilon:.3f}), and "
        hint = "Whatever is trained on these users next adds to it." if charges else "Raise --plan.epsilon."
        super().__init__(
            f"nothing is trained: {spent if charges else ''}one more round would exceed ε = {limit:g}. {hint}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.charges, self.epsilon, self.limit)


def _of_held_out(event: Event) -> bool:
    return isinstance(event, OfSplit) and event.split == HELD_OUT


def require_charged(ledger: Charges, rounds: int, entries: int) -> None:
    """Refuse a ledger that lacks charges: somebody put another file in its place, and ε would be understated.

    Raises:
        InvalidInput: When it has fewer entries than the checkpoint saw, or no charge for a round that was released.
    """
    missing = set(range(rounds)) - {one.round for one in ledger.entries[:entries] if one.purpose == MODEL_UPDATE}
    if len(ledger) < entries or missing:
        raise InvalidInput(
            "resume",
            f"a ledger with {len(ledger)} charges",
            f"the ledger of {entries} charges or more that the run wrote",
            "Put the ledger back: without it nothing can be claimed.",
        )
