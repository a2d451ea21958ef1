"""Noise allocated by importance, as the house has it, that also says how uneven it was."""

from dataclasses import dataclass

import numpy as np

from fedsim.privacy.events import Event
from fedsim.privacy.mechanisms.adaptive_noise import AdaptiveGaussianNoise, AdaptiveNoise
from fedsim.privacy.mechanisms.allocation import ImportanceAllocator
from fedsim.privacy.mechanisms.blocks import Blocks
from fedsim.privacy.mechanisms.mechanism import MECHANISMS
from fedsim.privacy.mechanisms.noise import Sizes

NAME = f"{__name__}:observed-adaptive-noise"
LEAST_SCALES: list[float] = []
"""The least scale of each round that this process released. Scales follow from earlier releases."""


class _Observed(AdaptiveGaussianNoise):
    def observe(self, released: np.ndarray, parameters: np.ndarray) -> None:
        LEAST_SCALES.append(float(self.allocator.scales.min()))
        super().observe(released, parameters)


@MECHANISMS.register
@dataclass(frozen=True, kw_only=True)
class ObservedAdaptiveNoise(AdaptiveNoise):
    """`adaptive-noise`; its noise and its guarantee are untouched."""

    name = "observed-adaptive-noise"
    summary = "adaptive-noise that says how uneven it was"

    def noise(self, release: Event | None, noise_multiplier: float, sizes: Sizes) -> AdaptiveGaussianNoise:
        return _Observed(noise_multiplier, sizes, ImportanceAllocator(Blocks.by_matrix(sizes), self._settings()))
