"""The noise of a release whose coordinates are released apart: each part by whoever holds its sum.

What is released is the same, bit for bit, as what `Release.noised_mean` makes of the whole sum: dequantised, noised
and divided coordinate by coordinate, in the same precision.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedsim.clip import Clip
from fedsim.engine.exact import dequantise
from fedsim.errors import Failure
from fedsim.privacy.mechanisms import GaussianNoise, Noise
from fedsim.randomness import StreamNoise
from fedsim.release.release import Release


def why_whole(release: Release) -> str:
    """Why a run's noise must be added to the whole sum at once, as the end of a sentence; empty where it need not.

    Noise of any coordinates can be drawn alone where it is Gaussian, independent of earlier rounds', and of a clip
    that no release moves.
    """
    if release.correlated:
        return "its noise is correlated over rounds"
    if release.noise_key(0, 0) == b"":
        return "keys of secure noise are drawn by the server alone"
    if release.clip_rule is not None:
        return "its clip norm follows a noised count"
    noise = release.noise
    kind = type(noise)
    if not isinstance(noise, GaussianNoise) or (kind.add, kind.normals) != (GaussianNoise.add, GaussianNoise.normals):
        return "its mechanism's noise is not plain Gaussian"
    if kind.observe is not Noise.observe:
        return "its mechanism learns from whole releases"
    return ""


@dataclass(frozen=True, kw_only=True)
class CoordinateNoise:
    """What one release does to a sum, so that any of its coordinates can be released alone.

    Attributes:
        normals: Of each stretch of coordinates, one after the other: how many, and the noise's standard deviation.
            Nothing where no noise is added.
        key: Of the noise's stream (`StreamNoise.key`), used for this release alone.
        resolution: Step of the grid that exact sums lie on; 0 for float32 sums.
        normaliser: What the noised sum is divided by: a public constant.
    """

    normals: tuple[tuple[int, float], ...]
    key: bytes
    resolution: float
    normaliser: float

    @classmethod
    def of(
        cls, release: Release, clip: Clip, round: int, attempt: int, repeat: int, resolution: float
    ) -> "CoordinateNoise":
        """Of a round's release.

        Args:
            release: The run's.
            clip, round, attempt, resolution: As noised_mean would be given them.
            repeat: How often another sum was to be released for this round and attempt, and was not: each has noise of
                its own.

        Raises:
            Failure: `why_whole` has something against it.
        """
        if reason := why_whole(release):
            raise Failure(f"the noise of some coordinates cannot be drawn alone: {reason}")
        return cls(
            normals=release.noise.normals(clip),
            key=release.noise_key(round, attempt, repeat),
            resolution=resolution,
            normaliser=float(release.plan.normaliser),
        )

    def require_all(self, size: int) -> None:
        """Make sure that each of so many coordinates gets noise, or that none is to be added.

        Raises:
            Failure: Some would get none.
        """
        noised = sum(count for count, _ in self.normals)
        if self.normals and noised != size:
            raise Failure(f"a sum of {size} values cannot be released for {noised} parameters")

    def to_values(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "key": self.key.hex()}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "CoordinateNoise":
        """What to_values() returned, as JSON may have brought it."""
        normals = tuple((int(count), float(std)) for count, std in values["normals"])
        return cls(**{**values, "normals": normals, "key": bytes.fromhex(values["key"])})

    def mean(self, total: np.ndarray, first: int, threads: int = 1) -> np.ndarray:
        """The released mean of some coordinates, float32.

        Args:
            total: Their sum, int64 (of steps of the grid) or float32; may be overwritten.
            first: The number of the first of them in the vector.
            threads: How many may draw at the same time.
        """
        values = dequantise(total, self.resolution) if self.resolution else total
        source = StreamNoise.from_key(self.key, first, threads)
        start = 0
        for count, std in self.normals:
            part = slice(max(start, first) - first, max(min(start + count, first + len(values)) - first, 0))
            if part.start < part.stop:
                source.add_normal(values[part], std)
            start += count
        values /= self.normaliser
        return values.astype(np.float32, copy=False)
