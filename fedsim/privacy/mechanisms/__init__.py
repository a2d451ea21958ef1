"""Mechanisms: how a clipped sum is released, and what may be claimed for it. One file a mechanism.

`MECHANISMS` knows them by name. Importing this package registers the project's own.
"""

from fedsim.privacy.mechanisms.adaptive_noise import AdaptiveNoise
from fedsim.privacy.mechanisms.banded.mechanism import Banded
from fedsim.privacy.mechanisms.equal_energy import LayerNoise, MatrixNoise
from fedsim.privacy.mechanisms.gaussian import Gaussian
from fedsim.privacy.mechanisms.laplace.mechanism import RandomisedLaplace
from fedsim.privacy.mechanisms.mechanism import MECHANISMS, Mechanism
from fedsim.privacy.mechanisms.noise import DrawsAhead, GaussianNoise, Noise, NoiseSource, Sizes
from fedsim.privacy.mechanisms.quantile_clip import QuantileClip

__all__ = [
    "MECHANISMS",
    "AdaptiveNoise",
    "Banded",
    "DrawsAhead",
    "Gaussian",
    "GaussianNoise",
    "LayerNoise",
    "MatrixNoise",
    "Mechanism",
    "Noise",
    "NoiseSource",
    "QuantileClip",
    "RandomisedLaplace",
    "Sizes",
]
