"""What a sampling scheme is: who is drawn, and the event of it."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedsim.privacy.events import Event
from fedsim.registry import Choice, Choices


class Streams(Protocol):
    """Keyed generators of the sampling: streams(round) is a round's own, streams() one for the whole run.

    Each depends on the run's secret seed and its place alone, whoever asks and however often. A round that was lost
    and runs again has another generator of its own; that of the whole run stays.
    """

    def __call__(self, *place: int) -> np.random.Generator: ...


@dataclass(frozen=True, kw_only=True)
class Sampling(Choice):
    """How units join a round. A scheme is a frozen dataclass of this, registered by `SAMPLINGS.register`.

    Its fields are its options, set by `--plan.sampling-options name=value`.
    """

    @abstractmethod
    def draw(self, population: int, probability: float, round: int, streams: Streams) -> np.ndarray:
        """Who takes part in a round: places in the population, sorted, each at most once, int64.

        Args:
            population: Units there are: users (ULS) or kept examples (ELS).
            probability: Chance of each unit to take part, above 0 and at most 1.
            round: The round, from 0.
            streams: Randomness, used for nothing else.
        """

    @abstractmethod
    def event(self, *, population: int, probability: float, noise_multiplier: float, group_size: int | None) -> Event:
        """What one round is accounted as that adds Gaussian noise to a sum of the units drawn.

        Each round is charged as this, and rounds are composed as if drawn independently: a scheme that ties them
        together (cyclic sampling, say) must return what bounds every round given all others, or must not be used.

        Args:
            population: As for draw.
            probability: As for draw.
            noise_multiplier: Noise standard deviation over the norm of one unit's update, above 0.
            group_size: Most units of one user (ELS); None where a user is a unit (ULS).

        Raises:
            InvalidInput: Where the scheme has no event for groups.
        """

    def expected_units(self, population: int, probability: float) -> float:
        """Public number of units expected in a round, by which sums are divided."""
        return probability * population

    @abstractmethod
    def in_words(self, units: str, population: int, probability: float) -> str:
        """How units join a step, as a clause: "each user joins …".

        Args:
            units: What is drawn: "user", or "kept example".
            population: As for draw.
            probability: As for draw.
        """

    def account_options(self, population: int, probability: float) -> Mapping[str, str] | None:
        """Options with which `account` finds the same event; None where it cannot, and the ledger must be asked."""
        return None


SAMPLINGS: Choices[Sampling] = Choices("plan.sampling")
"""Sampling schemes by name."""
