"""What a plan is: sampling, clip, noise, normaliser and adjacency, fixed together, and the event that follows.

Nothing else samples, clips, adds noise, divides or accounts, so that what is done, what is accounted and what is said
cannot disagree. `UlsPlan` and `ElsPlan` differ in what a unit is, and in what follows from that.
"""

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.plan.correlation import Correlation, correlation_of
from fedsim.plan.limits import require_adjacency, require_compute, require_separation
from fedsim.plan.sizes import UserSizes
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.bounds import Bounds
from fedsim.privacy.calibration import calibrate_noise_multiplier
from fedsim.privacy.events import Adjacency, Composed, Event
from fedsim.privacy.ledger import NOTHING
from fedsim.privacy.mechanisms import MECHANISMS, Gaussian, Mechanism, QuantileClip
from fedsim.rows import UserView
from fedsim.sampling import SAMPLINGS, Poisson, Population, Sampling, Streams, sample
from fedsim.validation import require_at_least, require_between, require_positive

Selection = Literal["random", "longest", "first", "chunk"]
Weighting = Literal["examples", "tokens"]


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """What the algorithms share.

    Attributes:
        group_size: Most examples of one user, in one round (ULS) or the whole run (ELS).
        sampling_probability: Chance of each unit to take part in a round.
        clip_norm: Bound C on one clipped unit, in the mechanism's norm; the first round's where the norm moves.
        noise_multiplier: Noise standard deviation over C; 0 means no privacy.
        steps: Rounds (ULS) or steps (ELS).
        delta: User-level δ at which ε is stated.
        adjacency: The change of the data set that the guarantee hides.
        selection: Which of a user's examples are taken when it has more than group_size.
        weighting: A unit's gradient is the mean over its examples or over its tokens.
        sampling: How units join a round.
        mechanism: How the clipped sum is released.
        noise_coefficients: c_0 = 1, c_1, … of noise correlated over as many rounds (bands): round t's is σ‖c‖₂ times
            x_t = ξ_t − Σ c_j·x_{t−j}, ξ standard normal, which costs what σ costs where rounds of one user are at
            least so many apart. (1,) is independent noise.
        noise_buffers: (weight, decay) of each buffer of noise correlated over all rounds, for users that take turns
            without sampling; () where there are none.
        clip_quantile: Share of units that the clip norm should leave unclipped, which it then follows; 0 keeps it.
        clip_count_std: Standard deviation of the noise on the count that it follows, in units.
        clip_learning_rate: How fast it follows.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str]
    redraws: ClassVar[bool]
    """Whether each round draws a user's examples anew (ULS), or they are kept for the whole run (ELS)."""
    default_group_size: ClassVar[int]
    adjacencies: ClassVar[tuple[Adjacency, ...]] = (Adjacency.ADD_OR_REMOVE_ONE_USER, Adjacency.REPLACE_ONE_USER)
    _sampled_in_words: ClassVar[str]
    _sampling_stream: ClassVar[str]

    group_size: int
    sampling_probability: float
    clip_norm: float
    noise_multiplier: float
    steps: int
    delta: float
    adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER
    selection: Selection = "random"
    weighting: Weighting = "examples"
    sampling: Sampling = field(default_factory=Poisson)
    mechanism: Mechanism = field(default_factory=Gaussian)
    noise_coefficients: tuple[float, ...] = (1.0,)
    noise_buffers: tuple[tuple[float, float], ...] = ()
    clip_quantile: float = 0.0
    clip_count_std: float = 0.0
    clip_learning_rate: float = 0.2

    def __post_init__(self) -> None:
        require_at_least("plan.group-size", self.group_size, 1)
        require_positive("plan.clip-norm", self.clip_norm)
        require_at_least("plan.noise-multiplier", self.noise_multiplier, 0)
        require_at_least("plan.rounds", self.steps, 1)
        require_between("plan.delta", self.delta, 0, 1)
        require_adjacency(self.adjacency, self.adjacencies)
        require_compute(self.sampling_probability, self.population, self._sampled_in_words)
        if self.clip_quantile and not self.shares_its_noise():
            raise InvalidInput("plan.clip-quantile", self.clip_quantile, f"0 with {self.mechanism.name}")
        object.__setattr__(self, "noise_coefficients", tuple(map(float, self.noise_coefficients)))
        object.__setattr__(self, "noise_buffers", tuple((float(one), float(two)) for one, two in self.noise_buffers))
        plain, noise = self.shares_its_noise(), (self.noise_coefficients, self.noise_buffers)
        require_separation(self.scheme, *noise, self.adjacency, plain=plain, mechanism=self.mechanism.name)

    # What a unit is ---------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def population(self) -> int:
        """Units that can be sampled."""

    @property
    @abstractmethod
    def public_sizes(self) -> dict[str, int]:
        """Sizes that are treated as public, by what they count."""

    @property
    @abstractmethod
    def gradients_per_round(self) -> float:
        """Expected gradient evaluations a round."""

    @abstractmethod
    def rows_per_unit(self, owned: int) -> int:
        """Examples in a unit of a user that owns so many."""

    @abstractmethod
    def units_per_user(self, owned: int) -> int:
        """Units that a user stands for that owns so many examples."""

    @abstractmethod
    def on(self, users: UserView) -> Self:
        """The same plan, with the population that these users make."""

    @abstractmethod
    def unit_ids(self, users: UserView, seed: int | bytes) -> Callable[[np.ndarray], np.ndarray]:
        """From places in the population to unit ids: user indices (ULS), or indices of kept rows (ELS).

        Args:
            users: The training split.
            seed: Seed of the sampling; decides which examples are kept.
        """

    @abstractmethod
    def population_of(self, users: UserView, seed: int | bytes) -> Population:
        """The units that can be sampled, and whose they are; arguments as for unit_ids."""

    @abstractmethod
    def rows_of(
        self, users: UserView, units: np.ndarray, round: int, seed: int | bytes
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows that units (ids, int64 [U]) compute on in a round; other arguments as for unit_ids.

        Returns (row indices int64 [R], position of each row's unit in units, int64 [R]).
        """

    @abstractmethod
    def costs(self, users: UserView, units: np.ndarray, row_tokens: int) -> np.ndarray:
        """Predicted tokens of units (ids, int64 [U]), float64 [U]; where rows are yet to be drawn, row_tokens each."""

    @property
    @abstractmethod
    def contribution_in_words(self) -> str:
        """What of one user's enters, up to the clip, as a clause without its end: "…; their one update is"."""

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the guarantee rests on, and does not claim, beyond what holds for every plan: sentences."""
        return ()

    @property
    def local_descent(self) -> tuple[int, float] | None:
        """(K, learning rate) of the steps that a unit takes before its clip; None where it is a gradient."""
        return None

    @classmethod
    @abstractmethod
    def units_in_group(cls, group_size: int) -> int | None:
        """Most units of one user; None where a user is a unit."""

    # Sampling ---------------------------------------------------------------------------------------------------

    @property
    def scheme(self) -> Sampling:
        """How units join a round, with nothing left open."""
        return self.sampling.at(self.sampling_probability)

    @property
    def normaliser(self) -> float:
        """The public constant by which the noised sum is divided: units expected in a round, never the realised."""
        return self.sampling.expected_units(self.population, self.sampling_probability)

    def sample(
        self, round: int, seed: int | bytes, attempt: int = 0, population: Population | None = None
    ) -> np.ndarray:
        """Who takes part in a round: places in the population, sorted, int64.

        Args:
            round, seed: The round, from 0, and the seed of the sampling.
            population: As population_of() has it; by default units of whom nothing is known but, if users, that.
            attempt: How often the round was begun before and lost; each attempt draws anew, from what is fixed for
                the whole run (a scheme's streams()) as before.

        Raises:
            InvalidInput: The scheme draws something else than places, in order, each once.
        """
        if population is None:
            population = Population(size=self.population, num_users=self.population, users_of=self._its_own_user)
        streams = Streams(seed, self._sampling_stream, attempt)
        return sample(self.sampling, population, self.sampling_probability, round, streams)

    @property
    def sampling_in_words(self) -> str:
        """How units join a step, as a clause."""
        return self.sampling.in_words(self._sampled_in_words, self.population, self.sampling_probability)

    def _its_own_user(self, places: np.ndarray) -> np.ndarray:
        if self.units_in_group(self.group_size) is not None:
            raise InvalidInput("population", None, f"known with {self.sampling.name}, which asks whose a unit is")
        return places

    # Release ----------------------------------------------------------------------------------------------------

    @property
    def clip_rule(self) -> QuantileClip | None:
        """The rule by which the clip norm moves; None where it stays."""
        if not self.clip_quantile:
            return None
        return QuantileClip(
            quantile=self.clip_quantile,
            learning_rate=self.clip_learning_rate,
            count_std=self.clip_count_std,
            expected_units=self.normaliser,
        )

    @property
    def release_name(self) -> str:
        """What this plan's release is called where plans are compared: the mechanism, or the rule of its clip."""
        return self.mechanism.name if self.clip_rule is None else QuantileClip.name

    @property
    def sum_noise_multiplier(self) -> float:
        """Noise multiplier of the clipped sum: σ, or more where a noised count takes its share of σ."""
        rule = self.clip_rule
        return self.noise_multiplier if rule is None else rule.sum_noise_multiplier(self.noise_multiplier)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each coordinate of the clipped sum, σC (before any scales)."""
        return self.sum_noise_multiplier * self.clip_norm

    @property
    def bands(self) -> int:
        """Rounds over which the noise is correlated; 1 where it is independent, or has buffers."""
        return len(self.noise_coefficients)

    @property
    def correlation(self) -> Correlation | None:
        """How the noise of a round depends on that of earlier ones; None where it does not."""
        return correlation_of(self.noise_coefficients, self.noise_buffers, self.scheme, self.steps)

    def shares_its_noise(self) -> bool:
        """Whether other noise can be charged together with the sum's: plain Gaussian noise, accounted as such."""
        plain = self.noise_multiplier == 0 or self.step_event() == self.sampled_event()
        return self.mechanism.norm_order == 2 and plain

    # Accounting -------------------------------------------------------------------------------------------------

    def sampled_event(self) -> Event:
        """What one round would be accounted as with plain Gaussian noise."""
        return self.sampling.event(
            population=self.population,
            probability=self.sampling_probability,
            noise_multiplier=self.noise_multiplier,
            group_size=self.units_in_group(self.group_size),
        )

    def step_event(self) -> Event:
        """What one round or step releases about those it can be of, as the accountant sees it."""
        return self.mechanism.event(self.sampled_event())

    def charge(self, round: int, attempt: int = 0) -> Event:
        """What a round, charged so often before, is charged as: step_event, and of whom it tells nothing."""
        return self.scheme.charge(self.step_event(), round, attempt)

    def event(self, steps: int | None = None) -> Event:
        """What so many rounds (all by default) release together about any one user."""
        return self.scheme.whole(self.step_event(), self.steps if steps is None else steps)

    def epsilon(self, steps: int | None = None) -> Bounds:
        """Certified bounds on the user-level ε at delta after steps steps (all of them by default)."""
        if self.noise_multiplier == 0:
            return Bounds(lower=math.inf, upper=math.inf)
        return epsilon_bounds(self.event(steps), self.delta, adjacency=self.adjacency)

    def calibrate(
        self, epsilon: float, delta: float | None = None, *, tolerance: float = 1e-3, before: Event = NOTHING
    ) -> Self:
        """The same plan with the least noise whose certified upper bound on ε is at most epsilon.

        Args:
            epsilon, delta: Target user-level ε, above 0 (inf removes the noise), and δ (by default the plan's own).
            tolerance: Relative distance of upper and lower bounds.
            before: What was released before, which the target holds together with.

        Raises:
            InvalidInput: When no noise reaches the target.
        """
        delta = self.delta if delta is None else delta
        if math.isinf(epsilon):
            return dataclasses.replace(self, noise_multiplier=0.0, delta=delta)
        calibration = calibrate_noise_multiplier(
            lambda noise: Composed(events=(before, dataclasses.replace(self, noise_multiplier=noise).event())),
            epsilon=epsilon,
            delta=delta,
            adjacency=self.adjacency,
            tolerance=tolerance,
        )
        return dataclasses.replace(self, noise_multiplier=calibration.value, delta=delta)

    # On the wire ------------------------------------------------------------------------------------------------

    def to_values(self) -> dict[str, Any]:
        """The plan as JSON values, for messages, checkpoints and run folders; `fedsim.plan.plan_from_values` reads
        them."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["adjacency"] = self.adjacency.value
        values["mechanism"] = MECHANISMS.values_of(self.mechanism)
        values["sampling"] = SAMPLINGS.values_of(self.sampling)
        # Through JSON, so that the values are what comes back: lists for tuples.
        plain: dict[str, Any] = json.loads(json.dumps({"algorithm": self.name, **values}))
        return plain

    def to_json(self) -> str:
        """to_values() as one line of JSON."""
        return json.dumps(self.to_values())

    # Drafts -----------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def draft(cls, sizes: UserSizes, *, gradients_per_round: float, group_size: int, **common: Any) -> Self:
        """The plan for a compute budget on users of these sizes.

        Args:
            sizes: The users.
            gradients_per_round: Expected gradient evaluations a round.
            group_size: Most examples of one user.
            common: The other fields.

        Raises:
            InvalidInput: When the data is too small for the budget.
        """
