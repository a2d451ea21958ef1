"""Random allocation: each user in exactly one round of every block of rounds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.privacy.events import Event, OfBlock, PoissonSubsampledGaussian, RandomAllocatedGaussian, Repeated
from fedsim.sampling.poisson import Poisson
from fedsim.sampling.population import Population, Streams
from fedsim.sampling.scheme import SAMPLINGS, Sampling


@SAMPLINGS.register
@dataclass(frozen=True, kw_only=True)
class RandomAllocation(Sampling):
    """Rounds go in blocks of t, t the least whole number of at least 1/q; each user is in one round of each block.

    Which one is drawn uniformly, independently for each user and each block, and never told. A round has N/t users on
    average. It hides more than Poisson sampling with probability 1/t does, which lets some be in several.

    A block is charged as a whole, once, whichever of its rounds are run. A round that was lost may have been released:
    run again with the same users, it would be theirs twice. So it is run with others, as a release of its own, by
    Poisson sampling with probability 1/t, charged as such on top; the other rounds of the block stay as they were
    drawn.
    """

    name = "random-allocation"
    summary = "each user in exactly one round of every block of rounds (uls)"

    def rounds_per_block(self, probability: float) -> int:
        """t; the one place where it is derived."""
        return max(1, math.ceil(1 / probability * (1 - 1e-12)))

    def draw(self, population: Population, probability: float, round: int, streams: Streams) -> np.ndarray:
        rounds = self.rounds_per_block(probability)
        if streams.attempt:
            return Poisson().draw(population, 1 / rounds, round, streams)
        block, place = divmod(round, rounds)
        users, ends = allocation(streams, block, population.size, rounds)
        return users[ends[place] : ends[place + 1]].astype(np.int64)

    def event(self, *, population: int, probability: float, noise_multiplier: float, group_size: int | None) -> Event:
        """What a whole block is accounted as."""
        if group_size is not None:
            hint = "A user's examples would be in several rounds of a block: no event is known for that."
            raise InvalidInput("plan.sampling", self.name, "poisson with els", hint)
        rounds = self.rounds_per_block(probability)
        return RandomAllocatedGaussian(rounds_per_block=rounds, noise_multiplier=noise_multiplier)

    def charge(self, event: Event, round: int, attempt: int = 0) -> Event:
        if not isinstance(event, RandomAllocatedGaussian):
            raise InvalidInput("plan.sampling", self.name, "used with mechanisms that add Gaussian noise")
        if attempt:
            chance = 1 / event.rounds_per_block
            return PoissonSubsampledGaussian(sampling_probability=chance, noise_multiplier=event.noise_multiplier)
        return OfBlock(event=event, block=round // event.rounds_per_block)

    def whole(self, event: Event, rounds: int) -> Event:
        if not isinstance(event, RandomAllocatedGaussian):
            raise InvalidInput("plan.sampling", self.name, "used with mechanisms that add Gaussian noise")
        return Repeated(event=event, count=-(-rounds // event.rounds_per_block))

    def expected_units(self, population: int, probability: float) -> float:
        return population / self.rounds_per_block(probability)

    def in_words(self, units: str, population: int, probability: float) -> str:
        return (
            f"each {units} joins exactly one of every {self.rounds_per_block(probability)} steps, drawn uniformly and "
            "independently and kept secret (random allocation)"
        )

    def account_options(self, population: int, probability: float) -> Mapping[str, str]:
        return {"sampling": self.name, "rounds-per-block": str(self.rounds_per_block(probability))}


@lru_cache(maxsize=2)
def allocation(streams: Streams, block: int, num_users: int, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Who joins when in a block: users by their rounds, [N], and where each round begins, int64 [t + 1].

    Drawn once a block, for N/t users a round: O(a round's users) each, and four bytes a user for each of two blocks.
    """
    drawn = streams(block).integers(rounds, size=num_users, dtype=np.int32 if rounds > 1 << 15 else np.int16)
    users = np.argsort(drawn, kind="stable").astype(np.int32 if num_users <= 1 << 31 else np.int64)
    users.flags.writeable = False
    return users, np.append(0, np.cumsum(np.bincount(drawn, minlength=rounds)))
