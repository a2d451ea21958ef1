"""Units that can be drawn, and whose they are; and the randomness that draws them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from fedsim.randomness import stream


def each_its_own(places: np.ndarray) -> np.ndarray:
    """The users of units that are users."""
    return places


@dataclass(frozen=True, kw_only=True)
class Population:
    """Units that can be drawn: users (ULS) or kept examples (ELS).

    Attributes:
        size: How many units there are.
        num_users: How many users they are of.
        users_of: From places in the population, integers [n] from 0, to their users, integers [n] below num_users.
    """

    size: int
    num_users: int
    users_of: Callable[[np.ndarray], np.ndarray] = each_its_own

    @classmethod
    def of_users(cls, num_users: int) -> Self:
        """A population whose units are users."""
        return cls(size=num_users, num_users=num_users)


@dataclass(frozen=True)
class Streams:
    """Keyed generators of the sampling: streams(round) is a round's own, streams() one for the whole run.

    Each depends on the run's secret seed and its place alone, whoever asks and however often. A round that was lost
    and runs again has another generator of its own; that of the whole run stays. Equal streams draw the same.

    Attributes:
        seed: The run's secret seed of the sampling.
        purpose: What is drawn.
        attempt: How often the round was begun before and lost.
    """

    seed: int | bytes
    purpose: str
    attempt: int = 0

    def __call__(self, *place: int) -> np.random.Generator:
        again = f" again {self.attempt}" if place and self.attempt else ""
        return stream(self.seed, self.purpose + again, *place)

    @property
    def of_the_run(self) -> Self:
        """The same whatever was lost: what a scheme may remember by."""
        return replace(self, attempt=0)
