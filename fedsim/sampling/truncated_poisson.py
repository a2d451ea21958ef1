"""Truncated Poisson sampling: each unit joins by itself, up to a hard cap on a round's units."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.privacy.events import Event, TruncatedPoissonSubsampledGaussian
from fedsim.privacy.truncation import Binomial
from fedsim.sampling.population import Population, Streams
from fedsim.sampling.scheme import SAMPLINGS, Sampling
from fedsim.sampling.subset import uniform_subset
from fedsim.validation import require_at_least

RARELY = 1e-15
"""Probability with which a round exceeds the cap that is chosen where none is given: so small that it costs no ε."""


@SAMPLINGS.register
@dataclass(frozen=True, kw_only=True)
class TruncatedPoisson(Sampling):
    """Every unit independently, with the same probability; of more than the cap, a uniform subset of as many stays.

    For a hard bound on a round's memory or time. Where the cap is often reached it costs noise: a user who is there
    then displaces another, so that sums with and without it may be 2C apart.

    Attributes:
        most_units: The cap; 0 takes the least one that a round exceeds with probability at most 1e-15.
    """

    name = "truncated-poisson"
    summary = "poisson, with a hard cap on a round's units (uls)"

    most_units: int = field(
        default=0, metadata={"help": "most units in a round; 0: as many as hardly any round would exceed"}
    )

    def __post_init__(self) -> None:
        require_at_least("most-units", self.most_units, 0)

    def cap(self, population: int, probability: float) -> int:
        """The cap; the one place where it is derived."""
        return self.most_units or max(1, Binomial(population, probability).least_cap(RARELY))

    def draw(self, population: Population, probability: float, round: int, streams: Streams) -> np.ndarray:
        """A binomial count, cut to the cap, then a uniform subset: that of a uniform subset is one of all."""
        generator = streams(round)
        count = min(int(generator.binomial(population.size, probability)), self.cap(population.size, probability))
        return uniform_subset(generator, population.size, count)

    def event(self, *, population: int, probability: float, noise_multiplier: float, group_size: int | None) -> Event:
        if group_size is not None:
            hint = "How many of a user's examples a cap leaves in a step is no binomial: no event is known for it."
            raise InvalidInput("plan.sampling", self.name, "poisson with els", hint)
        return TruncatedPoissonSubsampledGaussian(
            sampling_probability=probability,
            population_size=population,
            most_units=self.cap(population, probability),
            noise_multiplier=noise_multiplier,
        )

    def expected_units(self, population: int, probability: float) -> float:
        """E[min(Bin(N, q), B)], so that the noised sum over it is the mean of the users, however low the cap is."""
        return Binomial(population, probability).mean_up_to(self.cap(population, probability))

    def in_words(self, units: str, population: int, probability: float) -> str:
        cap = self.cap(population, probability)
        return (
            f"each {units} joins a step independently with probability {probability:g}, and of more than {cap} that "
            f"join {cap} are kept, each set of them equally likely (truncated Poisson sampling)"
        )

    def account_options(self, population: int, probability: float) -> Mapping[str, str]:
        return {
            "sampling": self.name,
            "sampling-probability": repr(probability),
            "population-size": str(population),
            "most-units": str(self.cap(population, probability)),
        }
