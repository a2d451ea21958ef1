"""The noise of a release: plain Gaussian, Gaussian with a scale for each block, Laplace with a random scale.

Each kind has a half for the clients (which norm to clip, at which scales) and a half for the server (add noise, learn
from what was released). State is made of released values alone and can be saved as named arrays.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from fedsim.privacy.events import RandomisedScaleLaplace
from fedsim.privacy.mechanisms.allocation import ImportanceAllocator
from fedsim.privacy.mechanisms.blocks import Blocks
from fedsim.privacy.mechanisms.vector_laplace import sample_release_noise

CHUNK = 1 << 20
"""Coordinates whose noise is drawn at once: bounds the extra memory to a few megabytes."""


class Noise(Protocol):
    """What a mechanism adds to a clipped sum."""

    def scales(self) -> Mapping[str, float]:
        """Scale of each parameter for the whitened clip of the next round, by name; empty where all are 1."""

    def add(self, total: np.ndarray, clip_norm: float, generator: np.random.Generator) -> None:
        """Add the noise of one release to a sum clipped at clip_norm, float32 or float64 [P], in place."""

    def observe(self, released: np.ndarray, parameters: np.ndarray) -> None:
        """Learn from a released mean [P] and the parameters [P] it belongs to, for later rounds."""

    def state(self) -> dict[str, np.ndarray]:
        """Everything a resumed run needs, as named arrays."""

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue from what state() returned."""


class GaussianNoise:
    """N(0, σ²C²) on every coordinate.

    Args:
        noise_multiplier: σ; 0 adds nothing.
    """

    def __init__(self, noise_multiplier: float) -> None:
        self.noise_multiplier = noise_multiplier

    def scales(self) -> Mapping[str, float]:
        return {}

    def add(self, total: np.ndarray, clip_norm: float, generator: np.random.Generator) -> None:
        """Add the noise; the generator may also be a `fedsim.secure_noise.SecureNoise`."""
        if self.noise_multiplier == 0:
            return
        if not isinstance(generator, np.random.Generator):
            generator.add_normal(total, self.noise_multiplier * clip_norm)  # fedsim.secure_noise, on its grid
            return
        std = total.dtype.type(self.noise_multiplier * clip_norm)
        for start in range(0, len(total), CHUNK):
            part = total[start : start + CHUNK]
            part += std * generator.standard_normal(len(part), dtype=total.dtype)

    def observe(self, released: np.ndarray, parameters: np.ndarray) -> None:
        pass

    def state(self) -> dict[str, np.ndarray]:
        return {}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        pass


class AllocatedNoise:
    """s·N(0, σ²C²), s the scale of the parameter's block: fixed, or led by an allocator.

    Args:
        noise_multiplier: σ.
        blocks: The blocks.
        fixed: Public scales, float64 [blocks].
        allocator: Gives the scales instead.
    """

    def __init__(
        self,
        noise_multiplier: float,
        blocks: Blocks,
        *,
        fixed: np.ndarray | None = None,
        allocator: ImportanceAllocator | None = None,
    ) -> None:
        self.plain = GaussianNoise(noise_multiplier)
        self.blocks = blocks
        self.allocator = allocator
        self.fixed = np.ones(len(blocks)) if fixed is None else fixed

    def scales(self) -> Mapping[str, float]:
        scales = self.fixed if self.allocator is None else self.allocator.scales
        return {} if (scales == 1).all() else self.blocks.by_parameter(scales)

    def add(self, total: np.ndarray, clip_norm: float, generator: np.random.Generator) -> None:
        by_name = self.scales()
        start = 0
        for name, size in zip(self.blocks.names, self.blocks.sizes, strict=True) if by_name else ():
            self.plain.add(total[start : start + size], clip_norm * by_name[name], generator)
            start += size
        if not by_name:
            self.plain.add(total, clip_norm, generator)

    def observe(self, released: np.ndarray, parameters: np.ndarray) -> None:
        if self.allocator is not None:
            self.allocator.observe(released, parameters)

    def state(self) -> dict[str, np.ndarray]:
        return {} if self.allocator is None else self.allocator.state()

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        if self.allocator is not None:
            self.allocator.load_state(dict(arrays))


class LaplaceNoise:
    """C·Laplace(1/S) on every coordinate, one S for the release, for sums clipped in L1.

    Args:
        event: What one release is accounted as; None adds nothing.
    """

    def __init__(self, event: RandomisedScaleLaplace | None) -> None:
        self.event = event

    def scales(self) -> Mapping[str, float]:
        return {}

    def add(self, total: np.ndarray, clip_norm: float, generator: np.random.Generator) -> None:
        if self.event is not None:
            noise = sample_release_noise(self.event, len(total), generator)
            total += (clip_norm * noise).astype(total.dtype)

    def observe(self, released: np.ndarray, parameters: np.ndarray) -> None:
        pass

    def state(self) -> dict[str, np.ndarray]:
        return {}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        pass
