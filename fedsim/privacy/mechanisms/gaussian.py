"""The plain Gaussian mechanism of DP-SGD and DP-FedAvg."""

from dataclasses import dataclass

from fedsim.privacy.events import Event
from fedsim.privacy.mechanisms.mechanism import MECHANISMS, Mechanism
from fedsim.privacy.mechanisms.noise import GaussianNoise, Sizes


@MECHANISMS.register
@dataclass(frozen=True, kw_only=True)
class Gaussian(Mechanism):
    """One L2 clip, and the same noise on every coordinate (Abadi et al. 2016; McMahan et al. 2018)."""

    name = "gaussian"
    summary = "the same Gaussian noise on every parameter"

    def noise(self, release: Event | None, noise_multiplier: float, sizes: Sizes) -> GaussianNoise:
        return GaussianNoise(noise_multiplier, sizes)
