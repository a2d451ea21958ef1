"""What was released, as data: events without algorithms.

An event names a mechanism, its sampling and its parameters. The accountant gives it a privacy-loss distribution.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from fedsim.errors import InvalidInput
from fedsim.privacy.adjacency import Adjacency as Adjacency
from fedsim.registry import Registry
from fedsim.validation import require_at_least, require_positive, require_probability


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that was released. A new kind is a frozen dataclass of this, registered by `EVENTS.register`, with a
    dominating pair (`dominating_pairs.register`).

    Attributes:
        kind: Its name in JSON.
        tight: Whether some users' data attain its dominating pair, so that bounds from below bound the release itself.
    """

    kind: ClassVar[str]
    tight: ClassVar[bool] = False


EVENTS: Registry[Event] = Registry("kind", "kind", imports=False)
"""Kinds of events by their name in JSON."""


@EVENTS.register
@dataclass(frozen=True, kw_only=True)
class Gaussian(Event):
    """A sum with L2 sensitivity 1 to one user, released once with N(0, σ²I), without sampling.

    Attributes:
        noise_multiplier: σ, noise standard deviation over the sensitivity.
    """

    kind: ClassVar[str] = "gaussian"
    tight: ClassVar[bool] = True
    noise_multiplier: float

    def __post_init__(self) -> None:
        require_positive("noise_multiplier", self.noise_multiplier)


@EVENTS.register
@dataclass(frozen=True, kw_only=True)
class PoissonSubsampledGaussian(Event):
    """ULS: each user joins independently with probability q, then a Gaussian release.

    Attributes:
        sampling_probability: q.
        noise_multiplier: σ.
    """

    kind: ClassVar[str] = "poisson-subsampled-gaussian"
    tight: ClassVar[bool] = True
    sampling_probability: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        require_probability("sampling_probability", self.sampling_probability)
        require_positive("noise_multiplier", self.noise_multiplier)


@EVENTS.register
@dataclass(frozen=True, kw_only=True)
class BinomialMixtureGaussian(Event):
    """ELS: each example joins independently with probability p; a user owns at most G of them.

    The user's contribution has norm K ~ Binomial(G, p) in the worst case (Charles et al. 2024, Theorem 2).

    Attributes:
        group_size: G.
        sampling_probability: p.
        noise_multiplier: σ, relative to the clip norm of one example.
    """

    kind: ClassVar[str] = "binomial-mixture-gaussian"
    tight: ClassVar[bool] = True
    group_size: int
    sampling_probability: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        require_at_least("group_size", self.group_size, 1)
        require_probability("sampling_probability", self.sampling_probability)
        require_positive("noise_multiplier", self.noise_multiplier)


@EVENTS.register
@dataclass(frozen=True, kw_only=True)
class MixtureOfGaussians(Event):
    """A user's contribution has norm s_i with probability w_i; N(0, σ²I) is added.

    Attributes:
        sensitivities: s_i ≥ 0.
        probabilities: w_i, summing to 1.
        noise_multiplier: σ.
    """

    kind: ClassVar[str] = "mixture-of-gaussians"
    tight: ClassVar[bool] = True
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


@EVENTS.register
@dataclass(frozen=True, kw_only=True)
class FixedSizeSubsampledGaussian(Event):
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


@EVENTS.register
@dataclass(frozen=True, kw_only=True)
class RandomAllocatedGaussian(Event):
    """A block of rounds, of which each user joins exactly one, drawn uniformly and kept secret: add or remove only.

    Attributes:
        rounds_per_block, noise_multiplier: t, and σ of each round, which may depend on earlier ones.
    """

    kind: ClassVar[str] = "random-allocated-gaussian"
    rounds_per_block: int
    noise_multiplier: float

    def __post_init__(self) -> None:
        require_at_least("rounds_per_block", self.rounds_per_block, 1)
        require_positive("noise_multiplier", self.noise_multiplier)


@EVENTS.register
@dataclass(frozen=True, kw_only=True)
class TruncatedPoissonSubsampledGaussian(Event):
    """ULS with a cap: each user joins independently with probability q; of more than B a uniform subset of B stays.

    q and B are constants that do not change where a user is added or removed.

    Attributes:
        sampling_probability: q.
        population_size: N, users to draw from, which is public; a neighbouring data set has one more, one fewer, or
            as many.
        most_units: B, the most users in a round.
        noise_multiplier: σ.
    """

    kind: ClassVar[str] = "truncated-poisson-subsampled-gaussian"
    sampling_probability: float
    population_size: int
    most_units: int
    noise_multiplier: float

    def __post_init__(self) -> None:
        require_probability("sampling_probability", self.sampling_probability)
        require_at_least("population_size", self.population_size, 1)
        require_at_least("most_units", self.most_units, 1)
        require_positive("noise_multiplier", self.noise_multiplier)


@EVENTS.register
@dataclass(frozen=True, kw_only=True)
class Repeated(Event):
    """The same event, count times, each with fresh randomness.

    Attributes:
        event: What is repeated.
        count: How often, at least 0.
    """

    kind: ClassVar[str] = "repeated"
    event: Event
    count: int

    def __post_init__(self) -> None:
        require_at_least("count", self.count, 0)


@EVENTS.register
@dataclass(frozen=True, kw_only=True)
class Composed(Event):
    """Several events one after the other, chosen in advance or adaptively.

    Attributes:
        events: In order; may be empty, and then nothing was released.
    """

    kind: ClassVar[str] = "composed"
    events: tuple[Event, ...]


@EVENTS.register
@dataclass(frozen=True, kw_only=True)
class OfBlock(Event):
    """A round of a block that counts as a whole, however many of its rounds a ledger holds; by itself it counts so.

    Attributes:
        event, block: What the whole block releases, and which of the ledger's blocks it is.
    """

    kind: ClassVar[str] = "of-block"
    event: Event
    block: int


@EVENTS.register
@dataclass(frozen=True, kw_only=True)
class OfGroup(Event):
    """A release about the users of one group alone, of several that everybody was assigned to for the whole run.

    One line of a ledger. Such lines of one ledger speak of the same assignment, which depends on no user's data and on
    no other user; `fedsim.privacy.ledger.merged` makes them one `OneOf`. By itself it counts as about everybody.

    Attributes:
        event: What is released.
        group: Whose, from 0.
        groups: How many there are.
    """

    kind: ClassVar[str] = "of-group"
    event: Event
    group: int
    groups: int

    def __post_init__(self) -> None:
        require_at_least("groups", self.groups, 1)
        if not 0 <= self.group < self.groups:
            raise InvalidInput("group", self.group, f"at least 0 and below {self.groups}")


@EVENTS.register
@dataclass(frozen=True, kw_only=True)
class OneOf(Event):
    """Several events, each user's data in at most one of them (parallel composition).

    What is known of a user comes from the one event that it is in, so the worst of them bounds all. That holds where a
    user is added or removed; one who is replaced may be in one event before and in another after.

    Attributes:
        events: At least one.
    """

    kind: ClassVar[str] = "one-of"
    events: tuple[Event, ...]

    def __post_init__(self) -> None:
        if not self.events:
            raise InvalidInput("events", self.events, "at least one")


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
    values = {item.name: _plain(getattr(event, item.name)) for item in fields(event)}
    return {"kind": EVENTS.name_of(type(event)), **values}


def from_json(values: dict[str, Any]) -> Event:
    """The event that to_json wrote.

    Raises:
        InvalidInput: For an unknown kind, a missing or unknown field, or a value out of range.
    """
    kind = values.get("kind") if isinstance(values, dict) else None
    if not isinstance(kind, str):
        raise InvalidInput("kind", kind, "one of " + ", ".join(EVENTS))
    cls = EVENTS.named(kind)
    expected = {item.name for item in fields(cls)}
    given = {name: _read(value) for name, value in values.items() if name != "kind"}
    if set(given) != expected:
        raise InvalidInput(kind, sorted(given), "an event with the fields " + ", ".join(sorted(expected)))
    return cls(**given)


def modules_of(event: Event) -> list[str]:
    """The modules outside the package that the kinds of an event and of its parts are of, sorted."""
    module, colon, _ = EVENTS.name_of(type(event)).partition(":")
    found = {module} if colon else set()
    for item in fields(event):
        value = getattr(event, item.name)
        for part in value if isinstance(value, tuple) else (value,):
            found.update(modules_of(part) if isinstance(part, Event) else ())
    return sorted(found)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return to_json(value) if isinstance(value, Event) else value


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_read(item) for item in value)
    return from_json(value) if isinstance(value, dict) else value
