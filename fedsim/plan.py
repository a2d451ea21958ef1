"""Plans: the one place where an algorithm is defined.

A plan fixes sampling, clipping, noise, normaliser and adjacency together, and derives from them the event that is
accounted, so that what is done and what is claimed cannot disagree. Nothing else samples, clips, adds noise, divides
or accounts.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.bounds import Bounds
from fedsim.privacy.calibration import calibrate_noise_multiplier
from fedsim.privacy.events import (
    Adjacency,
    BinomialMixtureGaussian,
    Event,
    PoissonSubsampledGaussian,
    Repeated,
)
from fedsim.privacy.mechanisms.inverse_scale import Law, check_law
from fedsim.privacy.mechanisms.quantile_clip import QuantileClip
from fedsim.privacy.mechanisms.registry import mechanism_named
from fedsim.randomness import stream
from fedsim.validation import require_at_least, require_between, require_positive, require_probability

Algorithm = Literal["uls", "els"]
Selection = Literal["random", "longest", "first", "chunk"]


class UserRows(Protocol):
    """What a plan needs to know of a store: which rows each user owns, and how long they are."""

    @property
    def num_users(self) -> int: ...

    @property
    def num_rows(self) -> int: ...


class UserTotals(Protocol):
    """What a draft needs to know of the users: how many, and what remains when each keeps a few examples."""

    @property
    def num_users(self) -> int: ...

    def kept(self, group_size: int, /) -> int: ...


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What the two algorithms share.

    Attributes:
        group_size: Most examples of one user, in one round (ULS) or the whole run (ELS).
        clip_norm: L2 bound C on one clipped unit.
        noise_multiplier: Noise standard deviation over C; 0 means no privacy.
        steps: Rounds (ULS) or steps (ELS).
        delta: User-level δ at which ε is stated.
        adjacency: The change of the data set that the guarantee hides.
        selection: Which of a user's examples are taken when it has more than group_size.
        weighting: A unit's gradient is the mean over its examples or over its tokens.
        mechanism: Name of the noise, of `fedsim.privacy.mechanisms.registry`.
        law: Law of the inverse scale, for the mechanism that has one; empty for plain Laplace.
        clip_quantile: Share of units that the clip norm should leave unclipped, which it then follows; 0 keeps it.
        clip_count_std: Standard deviation of the noise on the count that it follows, in units.
        clip_learning_rate: How fast it follows.
        name: "uls" or "els".
        title: Its name in reports.
        unit: What is sampled and clipped: a "user" or an "example".
        redraws: Whether each round draws a user's examples anew; otherwise they are kept once for the whole run.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str]
    redraws: ClassVar[bool]

    group_size: int
    clip_norm: float
    noise_multiplier: float
    steps: int
    delta: float
    adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER
    selection: Selection = "random"
    weighting: Literal["examples", "tokens"] = "examples"
    mechanism: str = "gaussian"
    law: Law = ()
    clip_quantile: float = 0.0
    clip_count_std: float = 0.0
    clip_learning_rate: float = 0.2

    def __post_init__(self) -> None:
        if self.law:
            object.__setattr__(self, "law", check_law(self.law))
        if self.clip_quantile and self.norm_order != 2:
            raise InvalidInput("plan.clip-quantile", self.clip_quantile, f"0 with the mechanism {self.mechanism}")
        require_at_least("plan.group-size", self.group_size, 1)
        require_positive("plan.clip-norm", self.clip_norm)
        require_at_least("plan.noise-multiplier", self.noise_multiplier, 0)
        require_at_least("plan.rounds", self.steps, 1)
        require_between("plan.delta", self.delta, 0, 1)

    @property
    def norm_order(self) -> int:
        """The norm in which units are clipped: 2, or 1 where the mechanism's guarantee is for L1."""
        return mechanism_named(self.mechanism).norm_order

    @property
    def normaliser(self) -> float:
        """The public constant by which the noised sum is divided."""
        raise AssertionError("UlsPlan and ElsPlan define this")

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
    def sum_noise_multiplier(self) -> float:
        """Noise multiplier of the clipped sum: σ, or more where a noised count takes its share of σ."""
        rule = self.clip_rule
        return self.noise_multiplier if rule is None else rule.sum_noise_multiplier(self.noise_multiplier)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each coordinate of the clipped sum, σC (before any scales)."""
        return self.sum_noise_multiplier * self.clip_norm

    def step_event(self) -> Event:
        """What one round or step releases, as the accountant sees it."""
        raise AssertionError("UlsPlan and ElsPlan define this")

    def event(self) -> Event:
        """What the whole run releases: steps independent repetitions of step_event."""
        return Repeated(event=self.step_event(), count=self.steps)

    def epsilon(self, steps: int | None = None) -> Bounds:
        """Certified bounds on the user-level ε at delta after steps steps (all of them by default)."""
        if self.noise_multiplier == 0:
            return Bounds(lower=math.inf, upper=math.inf)
        event = self.event() if steps is None else Repeated(event=self.step_event(), count=steps)
        return epsilon_bounds(event, self.delta, adjacency=self.adjacency)

    def calibrate(self, epsilon: float, delta: float | None = None) -> Any:
        """The same plan with the least noise whose certified upper bound on ε is at most epsilon.

        Args:
            epsilon: Target user-level ε, above 0; inf removes the noise.
            delta: Target δ; the plan's own by default.

        Raises:
            InvalidInput: When no noise reaches the target.
        """
        delta = self.delta if delta is None else delta
        if math.isinf(epsilon):
            return dataclasses.replace(self, noise_multiplier=0.0, delta=delta)

        calibration = calibrate_noise_multiplier(
            lambda noise: dataclasses.replace(self, noise_multiplier=noise).event(),
            epsilon=epsilon,
            delta=delta,
            adjacency=self.adjacency,
        )
        return dataclasses.replace(self, noise_multiplier=calibration.value, delta=delta)

    def to_json(self) -> str:
        """The plan as one line of JSON, for messages, checkpoints and run folders."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["adjacency"] = self.adjacency.value
        return json.dumps({"algorithm": self.name, **values})


@dataclass(frozen=True, kw_only=True)
class UlsPlan(_Plan):
    """User-level sampling (DP-SGD-ULS; with several local steps DP-FedAvg), Charles et al. 2024, Algorithm 2.

    Each round every user joins independently with probability q. A user that joins draws at most group_size of its
    examples, computes its update (their mean gradient, or θ − θ_K after K local steps), and clips it to C. Released:
    (Σ clipped updates + N(0, σ²C²I)) / (qN).

    Attributes:
        num_users: N, users in the training population. Treated as public.
        sampling_probability: q.
        local_steps: K.
        local_learning_rate: Learning rate of the local steps; without effect when K = 1.
    """

    name = "uls"
    title = "ULS"
    unit = "user"
    redraws = True

    num_users: int
    sampling_probability: float
    local_steps: int = 1
    local_learning_rate: float = 0.1

    @classmethod
    def draft(cls, sizes: UserTotals, *, gradients_per_round: float, group_size: int, **common: Any) -> Self:
        """The plan that spends the compute: cohorts of gradients_per_round / group_size users.

        Raises:
            InvalidInput: When that is more than there are users.
        """
        require_at_least("plan.group-size", group_size, 1)
        probability = gradients_per_round / group_size / sizes.num_users
        return cls(num_users=sizes.num_users, sampling_probability=probability, group_size=group_size, **common)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("num_users", self.num_users, 1)
        require_at_least("plan.local-steps", self.local_steps, 1)
        _require_compute(self.sampling_probability, self.num_users, "users in the training split")

    @property
    def population(self) -> int:
        """Units that can be sampled."""
        return self.num_users

    @property
    def expected_cohort_size(self) -> float:
        """M = qN, the public constant by which sums are divided."""
        return self.sampling_probability * self.num_users

    @property
    def normaliser(self) -> float:
        """The public constant by which the noised sum is divided."""
        return self.expected_cohort_size

    @property
    def gradients_per_round(self) -> float:
        """Expected gradient evaluations a round, at most M·G (fewer where users own fewer than G examples)."""
        return self.expected_cohort_size * self.group_size

    def rows_per_unit(self, owned: int) -> int:
        """Examples in the unit of a user that owns so many."""
        return min(self.group_size, owned)

    def units_per_user(self, owned: int) -> int:
        """Units of a user that owns so many examples: the user itself."""
        return 1

    def step_event(self) -> Event:
        sampled = PoissonSubsampledGaussian(
            sampling_probability=self.sampling_probability, noise_multiplier=self.noise_multiplier
        )
        return mechanism_named(self.mechanism).event(sampled, self.law)

    def sample(self, round: int, seed: int | bytes) -> np.ndarray:
        """The round's cohort: a Poisson sample of users, sorted, int64; costs O(cohort)."""
        return _poisson_sample(self.num_users, self.sampling_probability, stream(seed, "cohort", round))

    def rows_of(self, view: Any, units: np.ndarray, round: int, seed: int | bytes) -> tuple[np.ndarray, np.ndarray]:
        """The rows that each user of a cohort draws in a round.

        Args:
            view: The training split of a UserStore.
            units: User indices, int64 [U].
            round: The round.
            seed: Seed of the sampling.

        Returns:
            (row indices int64 [R], position of each row's user in units, int64 [R]).
        """
        from fedsim.data.contribution import draw_rows

        return draw_rows(view, units, self.group_size, seed, round, selection=self.selection)


@dataclass(frozen=True, kw_only=True)
class ElsPlan(_Plan):
    """Example-level sampling (DP-SGD-ELS), the centralized baseline, Charles et al. 2024, Algorithm 1.

    Once, each user keeps at most group_size examples. Each step every kept example joins independently with
    probability p; its gradient is clipped to C. Released: (Σ clipped gradients + N(0, σ²C²I)) / B. A user owns at most
    group_size of the examples, which is what the accountant charges (a Binomial(G, p) mixture of Gaussians).

    Attributes:
        num_examples: Kept examples |D|. Treated as public, and said so in the privacy statement.
        sampling_probability: p.
    """

    name = "els"
    title = "ELS"
    unit = "example"
    redraws = False

    num_examples: int
    sampling_probability: float

    @classmethod
    def draft(cls, sizes: UserTotals, *, gradients_per_round: float, group_size: int, **common: Any) -> Self:
        """The plan that spends the compute: batches of gradients_per_round of the examples kept.

        Raises:
            InvalidInput: When that is more than are kept.
        """
        require_at_least("plan.group-size", group_size, 1)
        kept = sizes.kept(group_size)
        return cls(num_examples=kept, sampling_probability=gradients_per_round / kept, group_size=group_size, **common)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("num_examples", self.num_examples, 1)
        _require_compute(self.sampling_probability, self.num_examples, "examples kept")

    @property
    def population(self) -> int:
        """Units that can be sampled."""
        return self.num_examples

    @property
    def expected_batch_size(self) -> float:
        """B = p·|D|, the public constant by which sums are divided."""
        return self.sampling_probability * self.num_examples

    @property
    def normaliser(self) -> float:
        """The public constant by which the noised sum is divided."""
        return self.expected_batch_size

    @property
    def gradients_per_round(self) -> float:
        """Expected gradient evaluations a step."""
        return self.expected_batch_size

    def rows_per_unit(self, owned: int) -> int:
        """Examples in a unit: itself."""
        return 1

    def units_per_user(self, owned: int) -> int:
        """Units of a user that owns so many examples: those it keeps."""
        return min(self.group_size, owned)

    def step_event(self) -> Event:
        sampled = BinomialMixtureGaussian(
            group_size=self.group_size,
            sampling_probability=self.sampling_probability,
            noise_multiplier=self.noise_multiplier,
        )
        return mechanism_named(self.mechanism).event(sampled, self.law)

    def kept_rows(self, view: Any, seed: int | bytes) -> np.ndarray:
        """The examples kept of each user, int64 row indices [num_examples]; the same for the whole run."""
        from fedsim.data.contribution import bounded_rows

        return bounded_rows(view, self.group_size, seed, selection=self.selection)

    def sample(self, round: int, seed: int | bytes) -> np.ndarray:
        """The step's batch: a Poisson sample of positions among the kept rows, sorted, int64; O(batch)."""
        return _poisson_sample(self.num_examples, self.sampling_probability, stream(seed, "batch", round))

    def rows_of(self, view: Any, units: np.ndarray, round: int, seed: int | bytes) -> tuple[np.ndarray, np.ndarray]:
        """Each unit is one example: (units, 0 … U−1)."""
        return units, np.arange(len(units), dtype=np.int64)


Plan = UlsPlan | ElsPlan
ALGORITHMS: dict[str, type[UlsPlan] | type[ElsPlan]] = {"uls": UlsPlan, "els": ElsPlan}


def plan_from_json(text: str) -> Plan:
    """The plan that to_json wrote.

    Raises:
        InvalidInput: For an unknown algorithm or a value out of range.
    """
    values = json.loads(text)
    algorithm = values.pop("algorithm", None)
    if algorithm not in ALGORITHMS:
        raise InvalidInput("algorithm", algorithm, "uls or els")
    values["adjacency"] = Adjacency(values["adjacency"])
    values["law"] = tuple(tuple(component) for component in values.get("law", ()))
    return ALGORITHMS[algorithm](**values)


def _require_compute(probability: float, population: int, what: str) -> None:
    if probability > 1:
        raise InvalidInput(
            "plan.gradients-per-round",
            f"{probability * population:g} units a round",
            f"at most the {population} {what}",
            "Lower --plan.gradients-per-round, or change --plan.group-size.",
        )
    require_probability("sampling_probability", probability)


def _poisson_sample(population: int, probability: float, generator: np.random.Generator) -> np.ndarray:
    """Each of population indices independently with the same probability: a binomial count, then a uniform subset."""
    count = int(generator.binomial(population, probability))
    return np.sort(generator.choice(population, size=count, replace=False, shuffle=False)).astype(np.int64)
