"""Clip and noise of a run's releases, round by round. State is made of released values alone."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from fedsim.clip import Clip

Sizes = Mapping[str, int]
"""Values of each trainable parameter by name, in the order of the flat vector."""


class NoiseSource(Protocol):
    """Where the randomness of one release comes from; used for nothing else.

    Gaussian noise is only ever added to the exact value that it hides, here and nowhere else: a normal number that
    somebody scales and adds on their own lies on no common grid with it, and the sum gives the value away.
    """

    def add_normal(self, total: np.ndarray, std: float) -> None:
        """Add N(0, std²) to every value of total, float32 or float64, in place."""

    def generator(self) -> np.random.Generator:
        """A generator for other laws; InvalidInput where the source draws Gaussian noise alone."""


class DrawsAhead(NoiseSource, Protocol):
    """A source that can draw before the values are known that its noise is for."""

    def draw_ahead(self, normals: Sequence[tuple[int, float]], dtype: type[np.generic], most: int) -> Iterator[None]:
        """Draw for later calls of add_normal, piece by piece; they add the same bits as without.

        Args:
            normals: How many coordinates each call will be for, and the standard deviation.
            dtype: Of their totals.
            most: Bytes to use at most; what is beyond is drawn when it is added.
        """


class Noise(ABC):
    """What a mechanism does in every round of one run."""

    def clip(self, norm: float) -> Clip:
        """The coming round's clip at a clip norm; may depend on public values and earlier releases alone."""
        return Clip(norm=norm)

    @abstractmethod
    def add(self, total: np.ndarray, clip: Clip, source: NoiseSource) -> None:
        """Add the noise of one release to a sum of updates clipped by `clip`, float32 or float64 [P], in place."""

    def normals(self, clip: Clip) -> tuple[tuple[int, float], ...]:
        """What `add` will ask a source for at this clip: (coordinates, standard deviation) of each call of add_normal.

        So that it can be drawn while the sum is not known yet. Nothing where nobody knows, or nothing is asked for;
        then it is drawn when it is added, as are calls that are for something else.
        """
        return ()

    @abstractmethod
    def in_words(self, clip: Clip) -> str:
        """What is added to a sum clipped by `clip`, as the predicate of a sentence: "Gaussian noise … is added …"."""

    def clip_in_words(self, clip: Clip) -> str:
        """How a unit is brought within `clip`, as the end of a sentence; true of every round at that clip norm."""
        return clip.in_words()

    def observe(self, released: np.ndarray, parameters: np.ndarray) -> None:
        """Learn from a released mean [P] and the parameters [P] it belongs to, for later rounds."""
        return

    def state(self) -> dict[str, np.ndarray]:
        """Everything a resumed run needs, as named arrays."""
        return {}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue from what state() returned."""
        return


class GaussianNoise(Noise):
    """N(0, (σ·C·s)²) on every coordinate, C the clip's norm and s the coordinate's scale.

    Divided by the scales it is N(0, σ²C²I) on a sum of vectors of norm at most C, whatever scales and blocks the clip
    has: the plain Gaussian mechanism. So a subclass may give any clip, made of public values and earlier releases.

    Args:
        noise_multiplier: σ; 0 adds nothing.
        sizes: Values of each parameter.
    """

    def __init__(self, noise_multiplier: float, sizes: Sizes) -> None:
        self.noise_multiplier = noise_multiplier
        self.sizes = sizes

    def normals(self, clip: Clip) -> tuple[tuple[int, float], ...]:
        return self.__draws(clip)

    def __draws(self, clip: Clip) -> tuple[tuple[int, float], ...]:
        """Coordinates and standard deviation, parameter after parameter: what no subclass may change by a hint."""
        if self.noise_multiplier == 0:
            return ()
        std = self.noise_multiplier * clip.norm
        if not clip.scales:
            return ((sum(self.sizes.values()), std),)
        return tuple((size, std * clip.scales[name]) for name, size in self.sizes.items())

    def add(self, total: np.ndarray, clip: Clip, source: NoiseSource) -> None:
        start = 0
        for size, std in self.__draws(clip):
            source.add_normal(total[start : start + size], std)
            start += size

    def in_words(self, clip: Clip) -> str:
        if self.noise_multiplier == 0:
            return "no noise is added"
        std = self.noise_multiplier * clip.norm
        if not clip.scales:
            return f"Gaussian noise of standard deviation {std:g} is added to each coordinate of the sum"
        low, high = min(clip.scales.values()), max(clip.scales.values())
        return (
            f"Gaussian noise of standard deviation {std:g} times the parameter's scale (so {std * low:g} to "
            f"{std * high:g}) is added to each coordinate of the sum"
        )
