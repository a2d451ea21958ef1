"""Randomised-scale Laplace noise as a mechanism for sums clipped in L1 (after LMO-DP)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from fedsim.clip import Clip
from fedsim.errors import InvalidInput
from fedsim.privacy.events import BinomialMixtureGaussian, Event, Gaussian, PoissonSubsampledGaussian
from fedsim.privacy.mechanisms.laplace.event import RandomisedScaleLaplace
from fedsim.privacy.mechanisms.laplace.inverse_scale import Law, check_law, rescaled
from fedsim.privacy.mechanisms.laplace.search import read_noise_file
from fedsim.privacy.mechanisms.laplace.vector import sample_release_noise
from fedsim.privacy.mechanisms.mechanism import MECHANISMS, Mechanism
from fedsim.privacy.mechanisms.noise import Noise, NoiseSource, Sizes

PLAIN_LAPLACE: Law = (("point", 1.0, 1.0, 0.0),)


class LaplaceNoise(Noise):
    """C·Laplace(1/S) on every coordinate, one S for the release, for sums clipped in L1.

    Args:
        event: What one release is accounted as; None adds nothing.
    """

    def __init__(self, event: RandomisedScaleLaplace | None) -> None:
        self.event = event

    def clip(self, norm: float) -> Clip:
        return Clip(norm=norm, order=1)

    def add(self, total: np.ndarray, clip: Clip, source: NoiseSource) -> None:
        if self.event is not None:
            noise = sample_release_noise(self.event, len(total), source.generator())
            total += (clip.norm * noise).astype(total.dtype)

    def in_words(self, clip: Clip) -> str:
        if self.event is None:
            return "no noise is added"
        if len(self.event.law) == 1 and self.event.law[0][0] == "point":
            return (
                f"Laplace noise of scale {clip.norm / self.event.law[0][2]:g} is added to each coordinate of the sum"
            )
        law = " + ".join(f"{weight:.4g} {name}({a:g}, {b:g})" for name, weight, a, b in self.event.law)
        return (
            f"Laplace noise of scale {clip.norm:g}/S is added to each coordinate of the sum, with one S for the whole "
            f"release, drawn from {law}"
        )


@MECHANISMS.register
@dataclass(frozen=True, kw_only=True)
class RandomisedLaplace(Mechanism):
    """Laplace noise whose inverse scale is drawn once a release.

    Attributes:
        law: Law of the inverse scale at noise multiplier 1; empty for plain Laplace noise.
    """

    name = "randomised-laplace"
    summary = "Laplace noise of random scale on sums clipped in L1 (after LMO-DP)"
    norm_order = 1
    secure = False

    law: Law = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "law", check_law(self.law) if self.law else ())

    def event(self, sampled: Event) -> RandomisedScaleLaplace:
        match sampled:
            case Gaussian():
                probability, group_size = 1.0, 1
            case PoissonSubsampledGaussian():
                probability, group_size = sampled.sampling_probability, 1
            case BinomialMixtureGaussian():
                probability, group_size = sampled.sampling_probability, sampled.group_size
            case _:
                raise InvalidInput("plan.sampling", sampled.kind, "poisson with randomised-laplace")
        law = rescaled(self.law or PLAIN_LAPLACE, 1 / sampled.noise_multiplier)
        return RandomisedScaleLaplace(law=law, sampling_probability=probability, group_size=group_size)

    def noise(self, release: Event | None, noise_multiplier: float, sizes: Sizes) -> LaplaceNoise:
        assert release is None or isinstance(release, RandomisedScaleLaplace)
        return LaplaceNoise(release)

    @classmethod
    def options(cls) -> dict[str, str]:
        return {"noise-file": "law of the inverse scale, found by `search-noise`; by default plain Laplace noise"}

    @classmethod
    def check_options(cls, options: Mapping[str, str]) -> None:
        """The file is read, and its guarantee proved again, when the mechanism is made."""

    @classmethod
    def of_options(cls, options: Mapping[str, str]) -> Self:
        return cls(law=read_noise_file(options["noise-file"]).law) if options else cls()
