"""One round: sample, charge, gather, release, step.

The server runs it with the dispatcher, the audit with the same workers in its own process, tests with mock clients:
how to gather is an argument, everything else is here and nowhere else.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np

from fedsim import phases
from fedsim.clip import Clip
from fedsim.engine.exact import dequantise, resolution_for
from fedsim.engine.same_inputs import Inputs
from fedsim.engine.work import Gathered, Vector, Work, on_host
from fedsim.errors import Failure
from fedsim.optimizer import ServerOptimizer
from fedsim.plan import Plan
from fedsim.privacy.ledger import NOTHING
from fedsim.release import CHAIN, LEFT, Chain, Kept, Release, ReleaseLog, ReleasesLost, release_norms, under
from fedsim.rows import UserView
from fedsim.seeds import Seeds
from server.budget import Budget as Budget
from server.budget import Charges as Charges

OPTIMIZER, RELEASE, PARAMETERS = "optimizer/", "release/", "parameters"


class Gather(Protocol):
    """How units' updates are had: from workers over a grid, or in process."""

    def __call__(
        self,
        request: Work,
        costs: np.ndarray,
        *,
        next_units: np.ndarray | None = None,
        next_costs: np.ndarray | None = None,
    ) -> Gathered:
        """The clipped sum over the request's units; see `server.dispatch.Dispatcher.gather`."""


class Diverged(Failure):
    """The weights are no longer finite. No checkpoint holds them.

    Attributes:
        round: The round whose step did it.
    """

    def __init__(self, round: int) -> None:
        self.round = round
        super().__init__(
            f"round {round}: the weights are no longer finite. Begin a new run with a lower --optimizer.learning-rate."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.round,)


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

    Attributes:
        phases: Where rounds' time goes.
        norms: How much of the last release is noise (release_norms).
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
        self.phases = phases.Phases()
        self.norms: dict[str, float] = {}
        self._known_chain: tuple[tuple[int, int], Chain] | None = None
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
        begins = 0 if self.log is None else self._chain(number).begins
        if self.release.correlated and number == begins:
            self.release.begin_chain(number, attempt)
        clip = self.release.clip
        if (kept := self._kept(number)) is not None:
            if self._to_be_charged(number):
                self.budget.charge(number)
            self.release.repeat(kept, self.parameters, number, attempt)
            self._leave(number, kept)
            self._step(number, kept.mean, clip)
            return {}
        with self.phases.of(phases.SAMPLING):
            units, following = self.units(number), self._following(number)
            costs, next_costs = self._costs(units), self._costs(following)
        resolution = resolution_for(clip, self.plan.population) if self.exact else 0.0
        request = Work(
            plan=self.plan.to_json(),
            round=number,
            sampling_seed=self.seeds.sampling,
            units=units,
            clip=clip,
            parameters=self.optimizer.vector,
            resolution=resolution,
            inputs=self.inputs,
        )
        return self._released(request, costs, attempt, partial(gather, next_units=following, next_costs=next_costs))

    def _released(self, request: Work, costs: np.ndarray, attempt: int, gather: Gather) -> dict[str, float]:
        """Charge, gather, release and step; returns what run() does."""
        number, clip, resolution = request.round, request.clip, request.resolution
        with self.phases.of(phases.NOISE), self.release.drawing_ahead(clip, number, attempt, resolution) as ahead:
            if self._to_be_charged(number):
                with self.phases.of(phases.CHARGE):
                    self.budget.charge(number)  # once all is known to be right, and before anybody is asked
            with self.phases.of(phases.TRANSPORT):
                gathered = gather(request, costs)
                total = dequantise(on_host(gathered.total), resolution) if resolution else gathered.total
            self.phases.divide(phases.TRANSPORT, gathered.seconds, gathered.phases)
            noised = self.release.noised_mean(total, clip, number, attempt=attempt, resolution=resolution)
            self.phases.beside(0.0 if ahead is None else ahead.seconds)
            mean = noised.astype(np.float32, copy=False) if isinstance(noised, np.ndarray) else noised
            statistics = {**gathered.statistics, "units": float(len(request.units))}
            self.release.observe(mean, self.optimizer.vector, statistics, number, attempt=attempt)
        if self.log is not None:
            with self.phases.of(phases.CHECKPOINT):
                self._leave(number, self.release.kept(mean))
        self._step(number, mean, clip)
        return statistics

    def affords(self, number: int) -> bool:
        """Whether the budget has room for a round, or the round is paid for already."""
        with self.phases.of(phases.CHARGE):
            return not self._to_be_charged(number) or self.budget.affords(number)

    def units(self, number: int) -> np.ndarray:
        """The units that a round samples: users (ULS), or rows of kept examples (ELS)."""
        places = self.plan.sample(number, self.seeds.sampling, self._attempt(number), self._population)
        return self._unit_ids(places)

    def _following(self, number: int) -> np.ndarray:
        """The units of the round after this one, none after the last, for workers to get ready."""
        return self.units(number + 1) if number + 1 < self.plan.steps else np.empty(0, dtype=np.int64)

    def _step(self, number: int, mean: Vector, clip: Clip) -> None:
        self.norms = release_norms(self.release, mean, clip, number - self.release.chain_state[0])
        with self.phases.of(phases.OPTIMIZER):
            self.optimizer.step(mean)
            if not self.optimizer.finite:
                raise Diverged(number)

    def _chain(self, number: int) -> Chain:
        """The chain of correlated noise that a round is of."""
        asked = (len(self.budget.ledger), number)
        if self._known_chain is None or self._known_chain[0] != asked:
            self._known_chain = asked, Chain.of(self.budget.ledger.entries, number)
        return self._known_chain[1]

    def _to_be_charged(self, number: int) -> bool:
        """Whether no charge stands yet for what a round releases.

        A round of correlated noise that was charged and has not left may use its charge.
        """
        return self.log is None or number not in self._chain(number).charged

    def _kept(self, number: int) -> Kept | None:
        """What a round of correlated noise released, or was about to; None where nothing of it has left.

        Raises:
            ReleasesLost: It left, or later ones of its chain did, and what it was is not kept.
        """
        if self.log is None:
            return None
        chain = self._chain(number)
        found = self.log.find(chain.number, number)
        left = chain.left.get(number)
        if left is not None and (found is None or found[1] != left):
            raise ReleasesLost(number, "what it released is not kept" if found is None else "what is kept is another")
        if found is None and any(later > number for later in chain.charged):
            raise ReleasesLost(number, "later rounds of its chain were charged")
        return None if found is None else found[0]

    def _leave(self, number: int, kept: Kept) -> None:
        """Keep a release, and note that it leaves; it may once this has returned."""
        assert self.log is not None
        chain = self._chain(number)
        digest = self.log.keep(chain.number, number, kept)
        if number not in chain.left:
            self.budget.ledger.charge(NOTHING, round=number, purpose=LEFT, note=digest)

    def require_repeatable(self, number: int) -> None:
        """Refuse to go on from a round where it or later ones have left, and nobody could repeat them.

        Raises:
            ReleasesLost: With correlated noise alone; any other round can be released anew.
        """
        if self.log is None:
            return
        chain = self._chain(number)
        if number > chain.begins and self.release.chain_state != (chain.begins, chain.number, number - chain.begins):
            raise ReleasesLost(number, "the state to go on from is of another chain")
        while self._kept(number) is not None:
            number += 1

    def restart(self, number: int) -> None:
        """Begin a new chain of correlated noise with a round: a composition of its own, charged on top."""
        self.budget.ledger.charge(NOTHING, round=number, purpose=CHAIN)

    def state(self) -> dict[str, np.ndarray]:
        """Everything a resumed run needs, as named arrays."""
        arrays = {PARAMETERS: self.parameters}
        arrays |= {OPTIMIZER + name: array for name, array in self.optimizer.state().items()}
        return arrays | {RELEASE + name: array for name, array in self.release.state().items()}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue from what state() returned."""
        self.optimizer.assign(arrays[PARAMETERS])
        self.optimizer.load_state(under(arrays, OPTIMIZER))
        self.release.load_state(under(arrays, RELEASE))

    def _attempt(self, number: int) -> int:
        """How often a round was begun and lost before; 0 too where a round that runs again repeats itself.

        With correlated noise a lost round repeats itself within its chain, and each chain draws anew.
        """
        if self.log is not None:
            return self._chain(number).number
        return 0 if self.seeds.repeats else self.budget.attempts(number)

    def _costs(self, units: np.ndarray) -> np.ndarray:
        return self.plan.costs(self.users, units, self.row_tokens)
