"""Cyclic Poisson sampling: users in groups that take turns, and within its turn each unit joins by itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.privacy.events import BinomialMixtureGaussian, Event, OfGroup, PoissonSubsampledGaussian, Repeated
from fedsim.sampling.poisson import Poisson
from fedsim.sampling.population import Population, Streams
from fedsim.sampling.scheme import SAMPLINGS, Sampling
from fedsim.sampling.subset import uniform_subset
from fedsim.validation import require_at_least


@SAMPLINGS.register
@dataclass(frozen=True, kw_only=True)
class CyclicPoisson(Sampling):
    """Each user is in one of `groups` groups for the whole run, and in round t only group t mod groups takes part.

    Within its turn each unit joins independently, with `groups` times the probability that a unit has in a round on
    average: so two rounds of one user are at least `groups` apart, which correlated noise needs, and rounds draw as
    many units as Poisson sampling does.

    Users are assigned independently of everything and uniformly, by a stream for the whole run. All of a user's
    examples are in the user's group; were examples assigned, a user could be in every round. A user's data enters the
    rounds of one group alone, so T rounds are ⌈T/groups⌉ releases about any user, also where noise is correlated over
    up to `groups` rounds (Choquette-Choo et al. 2023, arXiv 2306.08153, Theorem 4).

    Attributes:
        groups: How many.
    """

    name = "cyclic-poisson"
    summary = "users in groups that take turns; in its turn each unit joins independently"
    units_join_independently = True

    groups: int = field(default=1, metadata={"help": "how many groups of users take turns"})

    def __post_init__(self) -> None:
        require_at_least("groups", self.groups, 1)

    @property
    def separation(self) -> int:
        return self.groups

    def probability_in_turn(self, population: int, probability: float) -> float:
        """Of a unit to join, in a round of its user's group.

        Raises:
            InvalidInput: Where there are not enough units for so many groups.
        """
        if self.groups * probability > 1 + 1e-12:
            raise InvalidInput(
                "groups",
                self.groups,
                f"at most {int(1 / probability)} where a round takes {probability * population:g} of "
                f"{population} units, all of one group",
                "Lower --plan.bands or --plan.gradients-per-round.",
            )
        return min(1.0, self.groups * probability)

    def draw(self, population: Population, probability: float, round: int, streams: Streams) -> np.ndarray:
        """Poisson sampling from all, of which those stay whose turn it is: O(groups · cohort)."""
        generator = streams(round)
        count = int(generator.binomial(population.size, self.probability_in_turn(population.size, probability)))
        drawn = uniform_subset(generator, population.size, count)
        if self.groups == 1:
            return drawn
        assigned = assignment(streams.of_the_run, population.num_users, self.groups)
        in_turn: np.ndarray = drawn[assigned[population.users_of(drawn)] == round % self.groups]
        return in_turn

    def event(self, *, population: int, probability: float, noise_multiplier: float, group_size: int | None) -> Event:
        in_turn = self.probability_in_turn(population, probability)
        if group_size is None:
            return PoissonSubsampledGaussian(sampling_probability=in_turn, noise_multiplier=noise_multiplier)
        return BinomialMixtureGaussian(
            group_size=group_size, sampling_probability=in_turn, noise_multiplier=noise_multiplier
        )

    def charge(self, event: Event, round: int, attempt: int = 0) -> Event:
        return event if self.groups == 1 else OfGroup(event=event, group=round % self.groups, groups=self.groups)

    def whole(self, event: Event, rounds: int) -> Event:
        return Repeated(event=event, count=-(-rounds // self.groups))

    def in_words(self, units: str, population: int, probability: float) -> str:
        if self.groups == 1:
            return Poisson().in_words(units, population, probability)
        in_turn = self.probability_in_turn(population, probability)
        return (
            f"every user is in one of {self.groups} groups for the whole run, assigned at random; the groups take "
            f"turns, and in its group's turn each {units} joins independently with probability {in_turn:g} (cyclic "
            "Poisson sampling)"
        )

    def account_options(self, population: int, probability: float) -> Mapping[str, str]:
        return {"bands": str(self.groups), "sampling-probability": repr(probability)}


@lru_cache(maxsize=4)
def assignment(streams: Streams, num_users: int, groups: int) -> np.ndarray:
    """The group of each user, uniform and independent, int [num_users]; the same for the whole run.

    Drawn once a run: two bytes a user, which stay.
    """
    assigned: np.ndarray = streams().integers(groups, size=num_users, dtype=np.int32 if groups > 1 << 15 else np.int16)
    assigned.flags.writeable = False
    return assigned
