"""Noise that follows the importance of blocks, as earlier releases show it (after ANADP, in whitened form)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedsim.clip import Clip
from fedsim.privacy.events import Event
from fedsim.privacy.mechanisms.allocation import AllocationSettings, ImportanceAllocator
from fedsim.privacy.mechanisms.blocks import Blocks
from fedsim.privacy.mechanisms.mechanism import MECHANISMS, Mechanism
from fedsim.privacy.mechanisms.noise import GaussianNoise, Sizes


class AdaptiveGaussianNoise(GaussianNoise):
    """Scales led by an allocator.

    Args:
        noise_multiplier: σ.
        sizes: Values of each parameter.
        allocator: Gives the scales of the parameters' blocks.
    """

    def __init__(self, noise_multiplier: float, sizes: Sizes, allocator: ImportanceAllocator) -> None:
        super().__init__(noise_multiplier, sizes)
        self.allocator = allocator

    def clip(self, norm: float) -> Clip:
        scales = self.allocator.scales
        return Clip(norm=norm, scales={} if (scales == 1).all() else self.allocator.blocks.by_parameter(scales))

    @property
    def _moves(self) -> bool:
        """Whether scales can ever differ."""
        return self.allocator.settings.exponent > 0 and self.allocator.settings.bound > 1

    def clip_in_words(self, clip: Clip) -> str:
        if not self._moves:
            return super().clip_in_words(clip)
        return (
            f"clipped to L2 norm {clip.norm:g} after division by a scale for each matrix, all equal in the first "
            f"{self.allocator.settings.warmup + 1} rounds and then led by what earlier rounds released"
        )

    def in_words(self, clip: Clip) -> str:
        if self.noise_multiplier == 0 or not self._moves:
            return super().in_words(clip)
        std = self.noise_multiplier * clip.norm
        return (
            f"Gaussian noise of standard deviation {std:g} times the round's scale of the parameter is added to each "
            "coordinate of the sum"
        )

    def observe(self, released: np.ndarray, parameters: np.ndarray) -> None:
        self.allocator.observe(released, parameters)

    def state(self) -> dict[str, np.ndarray]:
        return self.allocator.state()

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.allocator.load_state(dict(arrays))


@MECHANISMS.register
@dataclass(frozen=True, kw_only=True)
class AdaptiveNoise(Mechanism):
    """Less noise on the matrices that mattered more so far; see `AllocationSettings` for the fields."""

    name = "adaptive-noise"
    summary = "Gaussian noise allocated by importance seen in earlier releases (after ANADP, whitened)"

    exponent: float = AllocationSettings.exponent
    decay: float = AllocationSettings.decay
    smoothing: float = AllocationSettings.smoothing
    bound: float = AllocationSettings.bound
    warmup: int = AllocationSettings.warmup

    def __post_init__(self) -> None:
        self._settings()  # refuses what is out of range

    def noise(self, release: Event | None, noise_multiplier: float, sizes: Sizes) -> AdaptiveGaussianNoise:
        allocator = ImportanceAllocator(Blocks.by_matrix(sizes), self._settings())
        return AdaptiveGaussianNoise(noise_multiplier, sizes, allocator)

    def _settings(self) -> AllocationSettings:
        return AllocationSettings(
            exponent=self.exponent,
            decay=self.decay,
            smoothing=self.smoothing,
            bound=self.bound,
            warmup=self.warmup,
        )
