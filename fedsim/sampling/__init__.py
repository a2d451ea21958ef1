"""Sampling schemes: who takes part in a round, and what that is worth. One file a scheme.

`SAMPLINGS` knows them by name. Importing this package registers the project's own.
"""

from fedsim.sampling.poisson import Poisson
from fedsim.sampling.scheme import SAMPLINGS, Sampling, Streams

__all__ = ["SAMPLINGS", "Poisson", "Sampling", "Streams"]
