"""The user-level ε that can be certified for what a library really did: its own sampling, its own noise."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.calibration import calibrate_noise_multiplier
from fedsim.privacy.events import BinomialMixtureGaussian, Event, FixedSizeSubsampledGaussian, Gaussian, releases
from fedsim.privacy.group_privacy import group_privacy_epsilon

ADD_OR_REMOVE = "adding or removing one user"
EMPTYING = "emptying one user's rows, its place in the batches kept"


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What is certified.

    Attributes:
        epsilon: An upper bound.
        against: The change that it hides.
        by_group_privacy: What the example-level guarantee gives by group privacy, where the library counts examples;
            infinite where it gives nothing. For comparison only.
    """

    epsilon: float
    against: str = ADD_OR_REMOVE
    by_group_privacy: float | None = None


def poisson_rows(probability: float, noise_multiplier: float, steps: int, most_rows: int) -> Event:
    """Every row joins a step by itself, its gradient is clipped by itself, and no user has more rows than so many."""
    return releases(
        BinomialMixtureGaussian,
        steps,
        group_size=most_rows,
        sampling_probability=probability,
        noise_multiplier=noise_multiplier,
    )


def fixed_cohort(cohort: int, population: int, noise_multiplier: float, steps: int) -> Event:
    """A round's users are so many different ones of the population, each set of them as likely as any other."""
    return releases(
        FixedSizeSubsampledGaussian,
        steps,
        cohort_size=cohort,
        population_size=population,
        noise_multiplier=noise_multiplier,
    )


def cohort_with_replacement(cohort: int, population: int, noise_multiplier: float, steps: int) -> Event:
    """A round's users are so many independent draws, each uniform over the population: one may be there twice.

    Let a be draws from the others. With u among the users each draw is u instead with probability 1/N, by itself; a
    draw that is u changes the sum of a by x_u − x_a, of norm at most 2. Without u the sum is that of a. So, for
    given a, the pair is that of example-level sampling of a user with so many examples, probability 1/N, and twice the
    clip norm, which is half the noise multiplier; joint convexity takes a away again.
    """
    return releases(
        BinomialMixtureGaussian,
        steps,
        group_size=cohort,
        sampling_probability=1 / population,
        noise_multiplier=noise_multiplier / 2,
    )


def shuffled_epochs(epochs: int, noise_multiplier: float) -> Event:
    """Every user is in one batch of each epoch: nothing is amplified, for who shuffled may be known to be there.

    One whose rows are emptied adds zero to one release of each epoch, and everybody else's batches stay. One who is
    removed shifts them, which this does not cover.
    """
    return releases(Gaussian, epochs, noise_multiplier=noise_multiplier)


KINDS: dict[str, Callable[..., Event]] = {
    "poisson-rows": poisson_rows,
    "fixed-cohort": fixed_cohort,
    "cohort-with-replacement": cohort_with_replacement,
    "shuffled-epochs": shuffled_epochs,
}


def event_of(mechanism: dict[str, Any]) -> Event:
    """The event of a mechanism that a library's program reported.

    Raises:
        InvalidInput: For a kind that there is not.
    """
    values = dict(mechanism)
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise InvalidInput("mechanism.kind", kind, "one of " + ", ".join(KINDS))
    return KINDS[kind](**values)


def certify(mechanism: dict[str, Any], delta: float) -> Certificate:
    """The user-level ε at delta of a mechanism as reported."""
    event = event_of(mechanism)
    epsilon = epsilon_bounds(event, delta).upper
    if mechanism["kind"] == "poisson-rows":
        return Certificate(epsilon=epsilon, by_group_privacy=group_privacy_epsilon(event, delta).value)
    return Certificate(epsilon=epsilon, against=EMPTYING if mechanism["kind"] == "shuffled-epochs" else ADD_OR_REMOVE)


def noise_for(mechanism: dict[str, Any], epsilon: float, delta: float) -> float:
    """The least noise multiplier with which a mechanism, given without it, has this user-level ε."""

    def event(noise_multiplier: float) -> Event:
        return event_of({**mechanism, "noise_multiplier": noise_multiplier})

    return calibrate_noise_multiplier(event, epsilon=epsilon, delta=delta).value


def shown(epsilon: float | None) -> str:
    """An ε for a table, rounded up."""
    if epsilon is None:
        return "none"
    if math.isinf(epsilon):
        return "∞"
    digits = 2 if epsilon < 100 else 0
    return f"{math.ceil(epsilon * 10**digits - 1e-9) / 10**digits:,.{digits}f}"
