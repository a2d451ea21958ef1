"""Poisson sampling: each unit joins each round by itself."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedsim.privacy.events import BinomialMixtureGaussian, Event, PoissonSubsampledGaussian
from fedsim.sampling.population import Population, Streams
from fedsim.sampling.scheme import SAMPLINGS, Sampling
from fedsim.sampling.subset import uniform_subset


@SAMPLINGS.register
@dataclass(frozen=True, kw_only=True)
class Poisson(Sampling):
    """Every unit independently, with the same probability; costs O(cohort) to draw."""

    name = "poisson"
    summary = "each unit joins independently with the same probability"
    units_join_independently = True

    def draw(self, population: Population, probability: float, round: int, streams: Streams) -> np.ndarray:
        """A binomial count, then a uniform subset."""
        generator = streams(round)
        count = int(generator.binomial(population.size, probability))
        return uniform_subset(generator, population.size, count)

    def event(self, *, population: int, probability: float, noise_multiplier: float, group_size: int | None) -> Event:
        if group_size is None:
            return PoissonSubsampledGaussian(sampling_probability=probability, noise_multiplier=noise_multiplier)
        return BinomialMixtureGaussian(
            group_size=group_size, sampling_probability=probability, noise_multiplier=noise_multiplier
        )

    def in_words(self, units: str, population: int, probability: float) -> str:
        if probability == 1:
            return f"every {units} is in every step"
        return f"each {units} joins a step independently with probability {probability:g} (Poisson sampling)"

    def account_options(self, population: int, probability: float) -> Mapping[str, str]:
        return {"sampling-probability": repr(probability)}
