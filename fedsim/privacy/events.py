"""What was released, as data: events without algorithms.

An event names a mechanism, its sampling and its parameters. The accountant gives it a privacy-loss distribution.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar

from fedsim.errors import InvalidInput
from fedsim.privacy.mechanisms.inverse_scale import check_law
from fedsim.validation import require_at_least, require_positive, require_probability


class Adjacency(Enum):
    """Which two data sets must be hard to tell apart."""

    ADD_OR_REMOVE_ONE_USER = "add-or-remove-one-user"
    REPLACE_ONE_USER = "replace-one-user"


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """A sum with L2 sensitivity 1 to one user, released once with N(0, σ²I), without sampling.

    Attributes:
        noise_multiplier: σ, noise standard deviation over the sensitivity.
    """

    kind: ClassVar[str] = "gaussian"
    noise_multiplier: float

    def __post_init__(self) -> None:
        require_positive("noise_multiplier", self.noise_multiplier)


@dataclass(frozen=True, kw_only=True)
class PoissonSubsampledGaussian:
    """ULS: each user joins independently with probability q, then a Gaussian release.

    Attributes:
        sampling_probability: q.
        noise_multiplier: σ.
    """

    kind: ClassVar[str] = "poisson-subsampled-gaussian"
    sampling_probability: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        require_probability("sampling_probability", self.sampling_probability)
        require_positive("noise_multiplier", self.noise_multiplier)


@dataclass(frozen=True, kw_only=True)
class BinomialMixtureGaussian:
    """ELS: each example joins independently with probability p; a user owns at most G of them.

    The user's contribution has norm K ~ Binomial(G, p) in the worst case (Charles et al. 2024, Theorem 2).

    Attributes:
        group_size: G.
        sampling_probability: p.
        noise_multiplier: σ, relative to the clip norm of one example.
    """

    kind: ClassVar[str] = "binomial-mixture-gaussian"
    group_size: int
    sampling_probability: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        require_at_least("group_size", self.group_size, 1)
        require_probability("sampling_probability", self.sampling_probability)
        require_positive("noise_multiplier", self.noise_multiplier)


@dataclass(frozen=True, kw_only=True)
class MixtureOfGaussians:
    """A user's contribution has norm s_i with probability w_i; N(0, σ²I) is added.

    Attributes:
        sensitivities: s_i ≥ 0.
        probabilities: w_i, summing to 1.
        noise_multiplier: σ.
    """

    kind: ClassVar[str] = "mixture-of-gaussians"
    sensitivities: tuple[float, ...]
    probabilities: tuple[float, ...]
    noise_multiplier: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "sensitivities", tuple(map(float, self.sensitivities)))
        object.__setattr__(self, "probabilities", tuple(map(float, self.probabilities)))
        if not self.sensitivities or len(self.sensitivities) != len(self.probabilities):
            raise InvalidInput("sensitivities", self.sensitivities, "as many as probabilities, and at least one")
        for value in self.sensitivities:
            require_at_least("sensitivities", value, 0)
        for value in self.probabilities:
            require_at_least("probabilities", value, 0)
        if abs(sum(self.probabilities) - 1) > 1e-9:
            raise InvalidInput("probabilities", self.probabilities, "numbers that sum to 1")
        require_positive("noise_multiplier", self.noise_multiplier)


@dataclass(frozen=True, kw_only=True)
class FixedSizeSubsampledGaussian:
    """A cohort of fixed size drawn uniformly without replacement, then a Gaussian release.

    Attributes:
        cohort_size: Users in the cohort.
        population_size: Users to draw from.
        noise_multiplier: σ.
    """

    kind: ClassVar[str] = "fixed-size-subsampled-gaussian"
    cohort_size: int
    population_size: int
    noise_multiplier: float

    def __post_init__(self) -> None:
        require_at_least("cohort_size", self.cohort_size, 1)
        if not self.population_size >= self.cohort_size:
            raise InvalidInput("population_size", self.population_size, f"at least cohort_size ({self.cohort_size})")
        require_positive("noise_multiplier", self.noise_multiplier)


@dataclass(frozen=True, kw_only=True)
class RandomisedScaleLaplace:
    """A sum of contributions clipped in L1, released with Laplace noise whose inverse scale is drawn from a law.

    A user has K ~ Binomial(G, p) contributions in the sum, each of L1 norm at most 1: G = 1 and p = q for user-level
    sampling, group size and example probability for example-level sampling.

    Attributes:
        law: Law of the inverse scale, relative to the clip norm, as `mechanisms.inverse_scale` describes it.
        sampling_probability: q or p.
        group_size: G.
    """

    kind: ClassVar[str] = "randomised-scale-laplace"
    law: tuple[tuple[str, float, float, float], ...]
    sampling_probability: float = 1.0
    group_size: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "law", check_law(self.law))
        require_probability("sampling_probability", self.sampling_probability)
        require_at_least("group_size", self.group_size, 1)


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """The same event, count times, each with fresh randomness.

    Attributes:
        event: What is repeated.
        count: How often, at least 0.
    """

    kind: ClassVar[str] = "repeated"
    event: "Event"
    count: int

    def __post_init__(self) -> None:
        require_at_least("count", self.count, 0)


@dataclass(frozen=True, kw_only=True)
class Composed:
    """Several events one after the other, chosen in advance or adaptively.

    Attributes:
        events: In order; may be empty, and then nothing was released.
    """

    kind: ClassVar[str] = "composed"
    events: tuple["Event", ...]


Event = (
    Gaussian
    | PoissonSubsampledGaussian
    | BinomialMixtureGaussian
    | MixtureOfGaussians
    | FixedSizeSubsampledGaussian
    | RandomisedScaleLaplace
    | Repeated
    | Composed
)

KINDS: dict[str, type] = {
    kind.kind: kind
    for kind in (
        Gaussian,
        PoissonSubsampledGaussian,
        BinomialMixtureGaussian,
        MixtureOfGaussians,
        FixedSizeSubsampledGaussian,
        RandomisedScaleLaplace,
        Repeated,
        Composed,
    )
}
"""Event types by their name in JSON."""


def releases(kind: Callable[..., Event], count: int, *, noise_multiplier: float, **values: Any) -> Repeated:
    """count releases of one kind: kind(noise_multiplier=…, **values), repeated.

    Without a release the noise does not matter: with count = 0, and only then, noise_multiplier may be 0, which an
    event by itself refuses. Every other value is checked all the same.

    Raises:
        InvalidInput: For a value out of range, noise_multiplier = 0 with count > 0 among them.
    """
    require_at_least("count", count, 0)
    noise = 1.0 if count == 0 and noise_multiplier == 0 else noise_multiplier
    return Repeated(event=kind(noise_multiplier=noise, **values), count=count)


def to_json(event: Event) -> dict[str, Any]:
    """The event as JSON values."""
    return {"kind": event.kind} | {item.name: _plain(getattr(event, item.name)) for item in fields(event)}


def from_json(values: dict[str, Any]) -> Event:
    """The event that to_json wrote.

    Raises:
        InvalidInput: For an unknown kind, a missing or unknown field, or a value out of range.
    """
    kind = values.get("kind") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise InvalidInput("kind", kind, "one of " + ", ".join(KINDS))
    expected = {item.name for item in fields(KINDS[kind])}
    given = {name: _read(value) for name, value in values.items() if name != "kind"}
    if set(given) != expected:
        raise InvalidInput(kind, sorted(given), "an event with the fields " + ", ".join(sorted(expected)))
    return KINDS[kind](**given)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return to_json(value) if hasattr(value, "kind") else value


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_read(item) for item in value)
    return from_json(value) if isinstance(value, dict) else value
