"""What one step of a plan releases, by algorithm and sampling."""

from collections.abc import Callable
from functools import partial

from fedsim.plan import ALGORITHMS
from fedsim.privacy.events import (
    BinomialMixtureGaussian,
    Event,
    FixedSizeSubsampledGaussian,
    Gaussian,
    PoissonSubsampledGaussian,
    RandomAllocatedGaussian,
    TruncatedPoissonSubsampledGaussian,
)

USERS, EXAMPLES = ALGORITHMS
STEPS: dict[tuple[str, str], tuple[Callable[..., Event], tuple[str, ...]]] = {
    (USERS, "poisson"): (PoissonSubsampledGaussian, ("sampling_probability",)),
    (USERS, "truncated-poisson"): (
        TruncatedPoissonSubsampledGaussian,
        ("sampling_probability", "population_size", "most_units"),
    ),
    (USERS, "fixed-size"): (FixedSizeSubsampledGaussian, ("cohort_size", "population_size")),
    (USERS, "random-allocation"): (RandomAllocatedGaussian, ("rounds_per_block",)),
    (USERS, "none"): (Gaussian, ()),
    (EXAMPLES, "poisson"): (BinomialMixtureGaussian, ("sampling_probability", "group_size")),
    (EXAMPLES, "none"): (partial(BinomialMixtureGaussian, sampling_probability=1.0), ("group_size",)),
}
"""What one step, or block of steps, releases by algorithm and sampling, and the options that it depends on beside the
noise."""
