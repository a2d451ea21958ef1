"""One round: sample, charge, gather, release, step.

The server runs it with the dispatcher, the audit with the same workers in its own process, tests with mock clients:
how to gather is an argument, everything else is here and nowhere else.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from fedsim.engine.exact import dequantise, resolution_for
from fedsim.engine.messages import TrainRequest, parameters_record
from fedsim.engine.same_inputs import Inputs
from fedsim.errors import Failure
from fedsim.plan import Plan
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import Composed, Event
from fedsim.privacy.ledger import LedgerEntry, merged
from fedsim.release import Release, ReleaseLog, ReleasesLost, under
from fedsim.rows import UserView
from server.dispatch import Gathered
from server.identity import Seeds
from server.optimizer import ServerOptimizer

OPTIMIZER, RELEASE, PARAMETERS = "optimizer/", "release/", "parameters"


class Gather(Protocol):
    """How units' updates are had: from workers over a grid, or in process."""

    def __call__(
        self,
        request: TrainRequest,
        costs: np.ndarray,
        *,
        next_units: np.ndarray | None = None,
        next_costs: np.ndarray | None = None,
    ) -> Gathered:
        """The clipped sum over the request's units; see `server.dispatch.Dispatcher.gather`."""


class Charges(Protocol):
    """Where rounds are charged: a ledger, or a list in memory where nothing is released to anybody."""

    @property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """All charges, in order."""

    def __len__(self) -> int:
        """How many."""

    def charge(self, event: Event, *, round: int) -> object:
        """Write down a release that is about to happen."""

    def event(self) -> Composed:
        """Everything charged so far."""


class Diverged(Failure):
    """The weights are no longer finite. No checkpoint holds them.

    Attributes:
        round: The round whose step did it.
    """

    def __init__(self, round: int) -> None:
        self.round = round
        super().__init__(f"round {round}: the weights are no longer finite. Lower --optimizer.learning-rate.")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.round,)


class Budget:
    """What a run may still spend: charged before each release, and never exceeded.

    Args:
        plan: Gives the event of one round, δ and adjacency.
        ledger: Where charges are written; what it holds already counts as spent.
        limit: User-level ε that the run must not exceed; inf for a run without privacy, which charges nothing.
    """

    def __init__(self, plan: Plan, ledger: Charges, limit: float) -> None:
        self.ledger = ledger
        self.limit = limit
        self._plan = plan
        self._private = plan.noise_multiplier > 0
        self._known: dict[tuple[int, tuple[Event, ...]], float] = {}
        self._attempts = Counter(entry.round for entry in ledger.entries)

    def epsilon(self) -> float:
        """Certified upper bound on the ε spent so far."""
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
        return self._plan.charge(round, self.attempts(round))

    def _after(self, *more: Event) -> float:
        """Upper bound on ε once more has been charged."""
        if not self._private:
            return math.inf
        known = (len(self.ledger), more)
        if known not in self._known:
            event = merged((*(entry.event for entry in self.ledger.entries), *more))
            self._known = {known: epsilon_bounds(event, self._plan.delta, adjacency=self._plan.adjacency).upper}
        return self._known[known]


class Round:
    """What a plan does in each of its rounds.

    Args:
        plan: The calibrated plan.
        users: The training users; their sizes are used here, never their text.
        seeds: Sampling and noise seeds.
        budget: Where rounds are charged.
        release: What leaves.
        optimizer: What steps; holds the parameters.
        exact: Whether sums are exact.
        row_tokens: Tokens of a row, for predicting what units cost.
        inputs: What data and base model the round is of; None where the workers share this process's.
        log: Where releases with correlated noise are kept until no resumed run can need them; None where none resumes.
    """

    def __init__(
        self,
        plan: Plan,
        users: UserView,
        seeds: Seeds,
        budget: Budget,
        release: Release,
        optimizer: ServerOptimizer,
        *,
        exact: bool = False,
        row_tokens: int = 1,
        inputs: Inputs | None = None,
        log: ReleaseLog | None = None,
    ) -> None:
        self.plan = plan
        self.users = users
        self.seeds = seeds
        self.budget = budget
        self.release = release
        self.optimizer = optimizer
        self.exact = exact
        self.row_tokens = row_tokens
        self.inputs = inputs
        self.log = log if release.correlated else None
        self._unit_ids = plan.unit_ids(users, seeds.sampling)
        self._population = plan.population_of(users, seeds.sampling)

    @property
    def parameters(self) -> np.ndarray:
        """The trainable parameters, float32 [P]."""
        return self.optimizer.parameters

    def run(self, number: int, gather: Gather) -> dict[str, float]:
        """One release and one optimizer step.

        Args:
            number: The round, from 0.
            gather: How the units' clipped sum is had.

        Returns:
            Sums over the cohort, private: "units" and what the workers report; nothing of a round that was released
            before, and is repeated.

        Raises:
            Diverged: The weights are no longer finite.
            ReleasesLost: With correlated noise, a round that may have been released, nobody knows what.
        """
        attempt = self._attempt(number)
        if self.release.correlated and number == self._chain_begins(number):
            self.release.begin_chain(number, attempt)
        if self.log is not None and (kept := self.log.find(number)) is not None:
            self.release.repeat(kept, self.parameters, number, attempt)
            self._step(number, kept.mean)
            return {}
        units, following = self.units(number), self._following(number)
        clip = self.release.clip
        resolution = resolution_for(clip, self.plan.population) if self.exact else 0.0
        request = TrainRequest(
            plan=self.plan.to_json(),
            round=number,
            sampling_seed=self.seeds.sampling,
            units=units,
            clip=clip,
            parameters=parameters_record(self.parameters),
            resolution=resolution,
            inputs=self.inputs,
        )
        costs, next_costs = self._costs(units), self._costs(following)
        if self._to_be_charged(number):
            self.budget.charge(number)  # once all is known to be right, and before anybody is asked
        gathered = gather(request, costs, next_units=following, next_costs=next_costs)
        total = dequantise(gathered.total, resolution) if resolution else gathered.total
        noised = self.release.noised_mean(total, clip, number, attempt=attempt, resolution=resolution)
        mean = noised.astype(np.float32, copy=False)
        statistics = {**gathered.statistics, "units": float(len(units))}
        self.release.observe(mean, self.parameters, statistics, number, attempt=attempt)
        if self.log is not None:
            self.log.keep(number, self.release.kept(mean))
        self._step(number, mean)
        return statistics

    def affords(self, number: int) -> bool:
        """Whether the budget has room for a round, or the round is paid for already."""
        return not self._to_be_charged(number) or self.budget.affords(number)

    def units(self, number: int) -> np.ndarray:
        """The units that a round samples: users (ULS), or rows of kept examples (ELS)."""
        places = self.plan.sample(number, self.seeds.sampling, self._attempt(number), self._population)
        return self._unit_ids(places)

    def _step(self, number: int, mean: np.ndarray) -> None:
        self.optimizer.step(mean)
        if not np.isfinite(self.parameters).all():
            raise Diverged(number)

    def _to_be_charged(self, number: int) -> bool:
        """Whether running a round makes a release that no charge stands for yet.

        A round of correlated noise that was charged and not kept has released nothing: it may use its charge.

        Raises:
            ReleasesLost: A later round was charged, so this one was released, and it is not kept.
        """
        if self.log is None:
            return True
        if self.log.find(number) is not None:
            return False
        charged = [entry.round for entry in self.budget.ledger.entries[self.log.chain(number).charges :]]
        if any(one > number or (one == number and not self.log.keeps) for one in charged):
            raise ReleasesLost(number, "what it released is not kept")
        return number not in charged

    def require_repeatable(self, number: int) -> None:
        """Refuse to go on from a round where later ones may have been released that nobody could repeat.

        Raises:
            ReleasesLost: With correlated noise alone; any other round can be released anew.
        """
        while self.log is not None and self.log.find(number) is not None:
            number += 1
        self._to_be_charged(number)

    def restart(self, number: int) -> None:
        """Begin a new chain of correlated noise with a round: a composition of its own, charged on top."""
        if self.log is not None:
            self.log.restart(number, len(self.budget.ledger))

    def _chain_begins(self, number: int) -> int:
        """The first round of the chain of correlated noise that a round is of."""
        return 0 if self.log is None else self.log.chain(number).begins

    def _following(self, number: int) -> np.ndarray:
        """The units of the round after this one, none after the last, for workers to get ready."""
        return self.units(number + 1) if number + 1 < self.plan.steps else np.empty(0, dtype=np.int64)

    def state(self) -> dict[str, np.ndarray]:
        """Everything a resumed run needs, as named arrays."""
        arrays = {PARAMETERS: self.parameters}
        arrays |= {OPTIMIZER + name: array for name, array in self.optimizer.state().items()}
        return arrays | {RELEASE + name: array for name, array in self.release.state().items()}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue from what state() returned."""
        self.parameters[:] = arrays[PARAMETERS]
        self.optimizer.load_state(under(arrays, OPTIMIZER))
        self.release.load_state(under(arrays, RELEASE))

    def _attempt(self, number: int) -> int:
        """How often a round was begun and lost before; 0 too where a round that runs again repeats itself.

        With correlated noise a lost round repeats itself within its chain, and each chain draws anew.
        """
        if self.log is not None:
            return self.log.chain(number).number
        return 0 if self.seeds.repeats else self.budget.attempts(number)

    def _costs(self, units: np.ndarray) -> np.ndarray:
        return self.plan.costs(self.users, units, self.row_tokens)
