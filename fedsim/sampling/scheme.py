"""What a sampling scheme is: who is drawn, and the event of it."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.privacy.events import Event, Repeated
from fedsim.registry import Choice, Choices
from fedsim.sampling.population import Population, Streams


@dataclass(frozen=True, kw_only=True)
class Sampling(Choice):
    """How units join a round. A scheme is a frozen dataclass of this, registered by `SAMPLINGS.register`.

    Its fields are its options, set by `--plan.sampling-options name=value`.

    Attributes:
        amplifies: Whether a round costs a user less than taking part for certain: then the guarantee rests on nobody's
            knowing who takes part.
        units_join_independently: Whether each unit joins a round by itself (within its user's turn, if users take
            turns), with a probability that other units do not change. Then draw() may be given places of which only
            some hold a unit: drawing from all and leaving out the empty ones is drawing from those that do.
    """

    amplifies: ClassVar[bool] = True
    units_join_independently: ClassVar[bool] = False

    @classmethod
    def permits_empty_places(cls) -> bool:
        """units_join_independently, as said by the class whose draw() this is, or a class made from that one.

        A class that draws in a way of its own, and says nothing, has not said it of this way.
        """
        for kind in cls.__mro__:
            if "units_join_independently" in vars(kind):
                return bool(vars(kind)["units_join_independently"])
            if "draw" in vars(kind):
                return False
        return False

    def at(self, probability: float) -> Self:
        """The scheme where units take part with this probability: what its options leave open is decided.

        The plan asks it before charge(), whole() and separation, which are told no probability.

        Raises:
            InvalidInput: For options that do not go with the probability.
        """
        return self

    @abstractmethod
    def draw(self, population: Population, probability: float, round: int, streams: Streams) -> np.ndarray:
        """Who takes part in a round: places in the population, sorted, each at most once, int64.

        Args:
            population: Units there are, and whose they are: users (ULS) or kept examples (ELS).
            probability: Chance of each unit to take part, above 0 and at most 1; on average over rounds where a
                scheme lets users take turns.
            round: The round, from 0.
            streams: Randomness, used for nothing else.
        """

    @abstractmethod
    def event(self, *, population: int, probability: float, noise_multiplier: float, group_size: int | None) -> Event:
        """What one round is accounted as that adds Gaussian noise to a sum of the units drawn.

        Rounds are composed as if drawn independently: a scheme that ties them together must return what bounds every
        round given all others, and say by charge() and whole() of whom a round tells nothing.

        Args:
            population: Units there are.
            probability: As for draw.
            noise_multiplier: Noise standard deviation over the norm of one unit's update, above 0.
            group_size: Most units of one user (ELS); None where a user is a unit (ULS).

        Raises:
            InvalidInput: Where the scheme has no event for groups.
        """

    def charge(self, event: Event, round: int, attempt: int = 0) -> Event:
        """What a round is charged as, of which event() is what it tells about those it can be of.

        Args:
            event: event(), as the mechanism releases it.
            round: The round, from 0.
            attempt: How often the round was charged before; draw() may have drawn otherwise then.
        """
        return event

    def whole(self, event: Event, rounds: int) -> Event:
        """What rounds from 0 on release together about any one user: all their charges."""
        return Repeated(event=event, count=rounds)

    @property
    def separation(self) -> int:
        """Rounds from one in which a user takes part to the next in which it may, at least 1."""
        return 1

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


def sample(scheme: Sampling, population: Population, probability: float, round: int, streams: Streams) -> np.ndarray:
    """What a scheme draws, checked: places in the population, in order, each once, int64.

    Raises:
        InvalidInput: It draws something else.
    """
    drawn = np.asarray(scheme.draw(population, probability, round, streams))
    whole = drawn.ndim == 1 and (np.issubdtype(drawn.dtype, np.integer) or not drawn.size)
    edges = np.concatenate([[-1], drawn, [population.size]]) if whole else np.zeros(2)
    if not (np.diff(edges) > 0).all():
        allowed = f"a scheme that draws places from 0 to {population.size - 1}, in order, each once"
        raise InvalidInput("plan.sampling", SAMPLINGS.name_of(type(scheme)), allowed)
    return drawn.astype(np.int64)


SAMPLINGS: Choices[Sampling] = Choices("plan.sampling")
"""Sampling schemes by name."""
