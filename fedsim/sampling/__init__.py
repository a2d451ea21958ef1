"""Sampling schemes: who takes part in a round, and what that is worth. One file a scheme.

`SAMPLINGS` knows them by name. Importing this package registers the project's own.
"""

from fedsim.sampling.cyclic_poisson import CyclicPoisson
from fedsim.sampling.poisson import Poisson
from fedsim.sampling.population import Population, Streams
from fedsim.sampling.random_allocation import RandomAllocation
from fedsim.sampling.scheme import SAMPLINGS, Sampling, sample
from fedsim.sampling.subset import uniform_subset
from fedsim.sampling.truncated_poisson import TruncatedPoisson
from fedsim.sampling.turns import Turns

__all__ = [
    "SAMPLINGS",
    "CyclicPoisson",
    "Poisson",
    "Population",
    "RandomAllocation",
    "Sampling",
    "Streams",
    "TruncatedPoisson",
    "Turns",
    "sample",
    "uniform_subset",
]
