"""One round: sample, charge, gather, release, step.

The server runs it with the dispatcher, the audit with the same workers in its own process, tests with mock clients:
how to gather is an argument, everything else is here and nowhere else.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from fedsim.clip import Clip
from fedsim.engine.exact import dequantise, resolution_for
from fedsim.engine.messages import TrainRequest, parameters_record
from fedsim.engine.same_inputs import Inputs
from fedsim.errors import Failure, InvalidInput
from fedsim.plan import Plan
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import Composed, Event, Repeated
from fedsim.privacy.ledger import LedgerEntry
from fedsim.privacy.mechanisms import GaussianNoise, NoiseSource
from fedsim.privacy.mechanisms.quantile_clip import COUNT_RESOLUTION
from fedsim.randomness import StreamNoise, stream
from fedsim.rows import UserView
from fedsim.secure_noise import SecureNoise
from server.dispatch import Gathered
from server.identity import Seeds
from server.optimizer import ServerOptimizer

CLIP_NORM = "clip_norm"
OPTIMIZER, RELEASE, NOISE, PARAMETERS = "optimizer/", "release/", "noise/", "parameters"


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
        self._known: dict[int, float] = {0: 0.0}
        self._attempts = Counter(entry.round for entry in ledger.entries)

    def epsilon(self) -> float:
        """Certified upper bound on the ε spent so far."""
        return self._after(0)

    def affords_another(self) -> bool:
        """Whether one more round stays within the limit."""
        return not self._private or self._after(1) <= self.limit

    def attempts(self, round: int) -> int:
        """How often a round was begun so far."""
        return self._attempts[round]

    def charge(self, round: int) -> None:
        """Write the charge of a round to disk; it returns once the charge would survive a crash."""
        if self._private:
            self.ledger.charge(self._plan.step_event(), round=round)
        self._attempts[round] += 1

    def _after(self, more: int) -> float:
        """Upper bound on ε once more rounds have been charged."""
        if not self._private:
            return math.inf
        count = len(self.ledger) + more
        if count not in self._known:
            event = Composed(events=(self.ledger.event(), Repeated(event=self._plan.step_event(), count=more)))
            self._known[count] = epsilon_bounds(event, self._plan.delta, adjacency=self._plan.adjacency).upper
        return self._known[count]


class Release:
    """What leaves the server each round, and the mechanism's state between rounds, made of released values alone.

    Args:
        plan: Names mechanism and clip rule; its noise multiplier is that of the whole release.
        sizes: Values of each parameter by name, in the order of the flat vector.
        noise_seed: Seed or secret key of the noise; None draws it from a cryptographic generator, under a new key for
            each release.

    Raises:
        InvalidInput: A mechanism whose noise is none that a moving clip norm's count can share, or whose clip is not
            of these parameters.
    """

    def __init__(self, plan: Plan, sizes: Mapping[str, int], noise_seed: int | bytes | None) -> None:
        self.plan = plan
        self.clip_norm = plan.clip_norm
        self.clip_rule = plan.clip_rule
        self._noise_seed = noise_seed
        event = plan.step_event() if plan.noise_multiplier > 0 else None
        self.noise = plan.mechanism.noise(event, plan.sum_noise_multiplier, sizes)
        self._sizes = sizes
        plain = isinstance(self.noise, GaussianNoise) and self.noise.noise_multiplier == plan.sum_noise_multiplier
        if self.clip_rule is not None and not plain:
            raise InvalidInput("plan.clip-quantile", plan.clip_quantile, f"0 with {plan.mechanism.name}")
        self.clip  # noqa: B018 - a clip that is not of this model is refused before anything is charged

    @property
    def clip(self) -> Clip:
        """What each unit's update is brought to in the coming round.

        Raises:
            InvalidInput: The mechanism made a clip of another norm or of other parameters.
        """
        clip = self.noise.clip(self.clip_norm)
        clip.require_parameters(self._sizes)
        if clip.order != self.plan.mechanism.norm_order:
            raise InvalidInput("clip.order", clip.order, f"{self.plan.mechanism.norm_order}, as its mechanism says")
        return clip

    def noised_mean(
        self, total: np.ndarray, clip: Clip, round: int, *, attempt: int = 0, resolution: float = 0.0
    ) -> np.ndarray:
        """(total + noise)/normaliser, in place: the released mean.

        The noise of one round is drawn from its own keyed stream and never used for another sum. Divided by the
        expected, never the realised, number of units: the latter would leak who took part.

        Args:
            total: The sum of updates clipped by `clip`, float32 or (from exact sums) float64 [P]; overwritten.
            clip: The round's clip.
            round: The round, from 0.
            attempt: How often the round was released before (and lost); each attempt has noise of its own.
            resolution: Step of the grid that exact sums lie on; 0 for float sums.
        """
        self.noise.add(total, clip, self._source("noise", round, attempt, resolution))
        total /= total.dtype.type(self.plan.normaliser)
        return total

    def observe(
        self,
        released: np.ndarray,
        parameters: np.ndarray,
        statistics: Mapping[str, float],
        round: int,
        *,
        attempt: int = 0,
    ) -> None:
        """Prepare the next round from this one's release, and from a noised count where the clip norm follows one.

        Args:
            released: The released mean [P].
            parameters: The parameters [P] it belongs to, before the step.
            statistics: Private sums over the units: "units" and "clipped_units" enter, noised.
            round: The round.
            attempt: How often the round was released before.
        """
        self.noise.observe(released, parameters)
        if self.clip_rule is not None:
            fraction = self.clip_rule.noised_fraction(
                statistics["units"] - statistics.get("clipped_units", 0.0),
                statistics["units"],
                self._source("clip-count", round, attempt, COUNT_RESOLUTION),
                private=self.plan.noise_multiplier > 0,
            )
            self.clip_norm = self.clip_rule.moved(self.clip_norm, fraction)

    def _source(self, purpose: str, round: int, attempt: int, resolution: float = 0.0) -> NoiseSource:
        """Where the noise of one release comes from; used for nothing else.

        resolution: Step of the public grid that the exact value lies on; 0 for float sums.
        """
        if self._noise_seed is None:
            return SecureNoise(resolution)
        return StreamNoise(stream(self._noise_seed, purpose, *((round, attempt) if attempt else (round,))))

    def state(self) -> dict[str, np.ndarray]:
        """Everything a resumed run needs, as named arrays; made of released values alone."""
        kept = {NOISE + name: array for name, array in self.noise.state().items()}
        return {CLIP_NORM: np.array(self.clip_norm), **kept}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue from what state() returned."""
        self.clip_norm = float(arrays[CLIP_NORM])
        self.noise.load_state(_under(arrays, NOISE))


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
        self._unit_ids = plan.unit_ids(users, seeds.sampling)

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
            Sums over the cohort, private: "units" and what the workers report.

        Raises:
            Diverged: The weights are no longer finite.
        """
        attempt = self._attempt(number)
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
        self.budget.charge(number)  # once all is known to be right, and before anybody is asked
        gathered = gather(request, costs, next_units=following, next_costs=next_costs)
        total = dequantise(gathered.total, resolution) if resolution else gathered.total
        noised = self.release.noised_mean(total, clip, number, attempt=attempt, resolution=resolution)
        mean = noised.astype(np.float32, copy=False)
        statistics = {**gathered.statistics, "units": float(len(units))}
        self.release.observe(mean, self.parameters, statistics, number, attempt=attempt)
        self.optimizer.step(mean)
        if not np.isfinite(self.parameters).all():
            raise Diverged(number)
        return statistics

    def units(self, number: int) -> np.ndarray:
        """The units that a round samples: users (ULS), or rows of kept examples (ELS)."""
        return self._unit_ids(self.plan.sample(number, self.seeds.sampling, self._attempt(number)))

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
        self.optimizer.load_state(_under(arrays, OPTIMIZER))
        self.release.load_state(_under(arrays, RELEASE))

    def _attempt(self, number: int) -> int:
        """How often a round was begun and lost before; 0 too where a round that runs again repeats itself."""
        return 0 if self.seeds.repeats else self.budget.attempts(number)

    def _costs(self, units: np.ndarray) -> np.ndarray:
        return self.plan.costs(self.users, units, self.row_tokens)


def _under(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
