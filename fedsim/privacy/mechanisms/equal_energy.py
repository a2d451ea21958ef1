"""The same total noise on every layer or matrix, whatever its size: public scales, whitened clip."""

from dataclasses import dataclass

from fedsim.clip import Clip
from fedsim.privacy.events import Event
from fedsim.privacy.mechanisms.allocation import equal_energy
from fedsim.privacy.mechanisms.blocks import Blocks
from fedsim.privacy.mechanisms.mechanism import MECHANISMS, Mechanism
from fedsim.privacy.mechanisms.noise import GaussianNoise, Sizes

LARGEST_SCALE = 4.0
"""How far a scale may be from the mean of all."""


class EqualEnergyNoise(GaussianNoise):
    """Scales s ∝ size^(−1/2), from sizes alone.

    Args:
        noise_multiplier: σ.
        sizes: Values of each parameter.
        blocks: The parameters that share a scale.
    """

    def __init__(self, noise_multiplier: float, sizes: Sizes, blocks: Blocks) -> None:
        super().__init__(noise_multiplier, sizes)
        scales = equal_energy(blocks, LARGEST_SCALE)
        self._scales = {} if (scales == 1).all() else blocks.by_parameter(scales)

    def clip(self, norm: float) -> Clip:
        return Clip(norm=norm, scales=self._scales)


@MECHANISMS.register
@dataclass(frozen=True, kw_only=True)
class LayerNoise(Mechanism):
    """Every numbered layer gets the same total noise."""

    name = "layer-noise"
    summary = "Gaussian noise of the same total on every layer, whitened"

    def noise(self, release: Event | None, noise_multiplier: float, sizes: Sizes) -> EqualEnergyNoise:
        return EqualEnergyNoise(noise_multiplier, sizes, Blocks.by_layer(sizes))


@MECHANISMS.register
@dataclass(frozen=True, kw_only=True)
class MatrixNoise(Mechanism):
    """Every matrix, with its bias, gets the same total noise."""

    name = "matrix-noise"
    summary = "Gaussian noise of the same total on every matrix, whitened: fixed scales from sizes alone"

    def noise(self, release: Event | None, noise_multiplier: float, sizes: Sizes) -> EqualEnergyNoise:
        return EqualEnergyNoise(noise_multiplier, sizes, Blocks.by_matrix(sizes))
