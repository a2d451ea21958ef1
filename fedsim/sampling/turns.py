"""Participation without sampling: users in groups that take turns, and everybody of a group takes part in its turn."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Self

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.privacy.events import BinomialMixtureGaussian, Event, Gaussian, OfGroup, Repeated
from fedsim.sampling.cyclic_poisson import assignment
from fedsim.sampling.population import Population, Streams
from fedsim.sampling.scheme import SAMPLINGS, Sampling
from fedsim.validation import require_at_least


@SAMPLINGS.register
@dataclass(frozen=True, kw_only=True)
class Turns(Sampling):
    """Each user is in one of g groups for the whole run, and in round t everybody of group t mod g takes part.

    It is for systems that cannot sample, or cannot hide who was sampled. Nothing is amplified: each turn of a user is
    a Gaussian release, ⌈T/g⌉ of them in all, and the guarantee holds beside whoever knows who takes part when. Rounds
    of one user are g apart, so that noise may be correlated over as many.

    Users are assigned independently of everything and uniformly, by a stream for the whole run, as under cyclic
    Poisson sampling; a round that was lost and runs again takes the same users.

    Attributes:
        groups: g; 0 for as many as leave each round the units that were asked for, ⌊1/q⌋.
    """

    name = "none"
    summary = "no sampling: users in groups that take turns, all of a group in its turn; nothing is amplified"
    amplifies = False

    groups: int = field(
        default=0, metadata={"help": "how many groups of users take turns; 0 for as many as leave rounds large enough"}
    )

    def __post_init__(self) -> None:
        require_at_least("groups", self.groups, 0)

    def at(self, probability: float) -> Self:
        most = math.floor(1 / probability * (1 + 1e-12))
        if self.groups > most:
            allowed = f"at most {most} where a round takes a share of {probability:g} of all units"
            raise InvalidInput("groups", self.groups, allowed, "Lower --plan.gradients-per-round.")
        return self if self.groups else dataclasses.replace(self, groups=most)

    @property
    def separation(self) -> int:
        return max(1, self.groups)

    def draw(self, population: Population, probability: float, round: int, streams: Streams) -> np.ndarray:
        """Everybody whose turn it is: O(those)."""
        groups = self.at(probability).groups
        places, ends = _by_group(streams.of_the_run, population, groups)
        turn = round % groups
        return places[ends[turn] : ends[turn + 1]].astype(np.int64)

    def event(self, *, population: int, probability: float, noise_multiplier: float, group_size: int | None) -> Event:
        if group_size is None:
            return Gaussian(noise_multiplier=noise_multiplier)
        return BinomialMixtureGaussian(
            group_size=group_size, sampling_probability=1.0, noise_multiplier=noise_multiplier
        )

    def charge(self, event: Event, round: int, attempt: int = 0) -> Event:
        groups = self.separation
        return event if groups == 1 else OfGroup(event=event, group=round % groups, groups=groups)

    def whole(self, event: Event, rounds: int) -> Event:
        return Repeated(event=event, count=-(-rounds // self.separation))

    def expected_units(self, population: int, probability: float) -> float:
        return population / self.at(probability).groups

    def in_words(self, units: str, population: int, probability: float) -> str:
        groups = self.at(probability).groups
        who = f"every {units} takes part in every step"
        if groups > 1:
            who = (
                f"every user is in one of {groups} groups for the whole run, assigned at random; the groups take "
                f"turns, and in its group's turn every {units} takes part"
            )
        return f"{who} (no sampling: no amplification is claimed, and who takes part when may be known)"

    def account_options(self, population: int, probability: float) -> Mapping[str, str]:
        return {"sampling": "none", "groups": str(self.at(probability).groups)}


@lru_cache(maxsize=4)
def _by_group(streams: Streams, population: Population, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Places in the population, those of one group after those of the other and in order, and where each begins.

    Once a run: four bytes for each place, which stay.
    """
    everybody = np.arange(population.size, dtype=np.int32 if population.size <= 1 << 31 else np.int64)
    if groups == 1:
        return everybody, np.array([0, population.size])
    group_of = assignment(streams, population.num_users, groups)[population.users_of(everybody)]
    places: np.ndarray = np.argsort(group_of, kind="stable").astype(everybody.dtype)
    return places, np.concatenate([[0], np.cumsum(np.bincount(group_of, minlength=groups))])
