"""The budget: charged before each release, and never exceeded."""

import math

from fedsim.plan import Plan
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import Composed, Repeated
from fedsim.privacy.ledger import Ledger


class Budget:
    """What a run may still spend.

    Args:
        plan: Gives the event of one round, δ and adjacency.
        ledger: Where charges are written; what it holds already counts as spent.
        limit: User-level ε that the run must not exceed; inf for a run without privacy, which charges nothing.
    """

    def __init__(self, plan: Plan, ledger: Ledger, limit: float) -> None:
        self._plan = plan
        self._ledger = ledger
        self._limit = limit
        self._private = plan.noise_multiplier > 0
        self._known: dict[int, float] = {0: 0.0}

    def epsilon(self) -> float:
        """Certified upper bound on the ε spent so far."""
        return self._after(0)

    def affords_another(self) -> bool:
        """Whether one more round stays within the limit."""
        return not self._private or self._after(1) <= self._limit

    def charge(self, round: int) -> None:
        """Write the charge of a round to disk; it returns once the charge would survive a crash."""
        if self._private:
            self._ledger.charge(self._plan.step_event(), round=round)

    def _after(self, more: int) -> float:
        """Upper bound on ε once more rounds have been charged."""
        if not self._private:
            return math.inf
        count = len(self._ledger) + more
        if count not in self._known:
            event = Composed(events=(self._ledger.event(), Repeated(event=self._plan.step_event(), count=more)))
            self._known[count] = epsilon_bounds(event, self._plan.delta, adjacency=self._plan.adjacency).upper
        return self._known[count]
