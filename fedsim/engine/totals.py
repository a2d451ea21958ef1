"""What a reply's vector is held to before it enters a sum, by whoever adds it: nothing but numpy is needed."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from fedsim.engine.work import Vector, Work, dtype_name

NORM_TOLERANCE, NORM_TOLERANCE_PER_UNIT = 1e-5, 2.0**-24
"""Relative. A float32 sum of n clipped updates may exceed n × bound by rounding: once in all, and in each addition."""
CHUNK = 1 << 16


class BadReply(Exception):
    """A reply that must not enter the sum."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the sum over some units' clipped updates can be.

    Attributes:
        size: Its values, P.
        units: How many updates it is of.
        bound: L2 norm that one of them has at most, as its clip implies.
        resolution: 0 for float32 sums; otherwise the step of the grid, and the sum is of int64.
    """

    size: int
    units: int
    bound: float
    resolution: float = 0.0

    @classmethod
    def of(cls, work: Work) -> Self:
        """What the answer to some work must be."""
        size = int(work.parameters.shape[0])
        return cls(size=size, units=len(work.units), bound=work.clip.bound, resolution=work.resolution)

    @property
    def dtype(self) -> str:
        """Of its values."""
        return "int64" if self.resolution else "float32"

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.size * np.dtype(self.dtype).itemsize

    def check_form(self, total: Vector) -> None:
        """Look at a sum's shape and type alone.

        Raises:
            BadReply: They are others.
        """
        found = dtype_name(total.dtype)
        if tuple(total.shape) != (self.size,) or found != self.dtype:
            raise BadReply(f"its sum is {found}{list(total.shape)}, not {self.dtype}[{self.size}]")

    def check(self, total: Vector) -> float:
        """Look at a sum, and return its L2 norm.

        Raises:
            BadReply: It has another shape or type, holds a value that is not finite, or is longer than so many clipped
                updates can be together.
        """
        self.check_form(total)
        norm = norm_within(total, self._longest / (self.resolution or 1.0)) * (self.resolution or 1.0)
        self.check_norm(norm)
        return norm

    def check_norm(self, norm: float) -> None:
        """Look at a sum's L2 norm alone.

        Raises:
            BadReply: It is not finite, or larger than that of so many clipped updates can be.
        """
        if not 0 <= norm <= self._longest:
            what = "holds values that are not finite" if not math.isfinite(norm) else f"has norm {norm:.6g}"
            raise BadReply(f"its sum {what}; {self.units} clipped updates have at most {self._longest:.6g}")

    @property
    def _longest(self) -> float:
        """The norm that their sum has at most."""
        return self.units * self.bound * (1 + NORM_TOLERANCE + self.units * NORM_TOLERANCE_PER_UNIT)


def norm_within(values: Vector, bound: float) -> float:
    """The L2 norm, to float32 accuracy where it is clearly below `bound` and to float64 accuracy otherwise.

    One pass over memory in the usual case; of a tensor always in float64, where it is. NaN or infinity in, NaN or
    infinity out.
    """
    if not isinstance(values, np.ndarray):
        return math.sqrt(sum(float(part.double().square().sum()) for part in values.split(1 << 24)))
    if values.dtype == np.float32:
        with np.errstate(over="ignore", invalid="ignore"):
            quick = math.sqrt(sum(float(np.dot(part, part)) for part in _parts(values)))
        # A dot product of 2^16 float32 terms is off by at most 2^16 × 2^-24 = 0.4 %.
        if quick < 0.99 * bound:
            return quick
    wide = (part.astype(np.float64) for part in _parts(values))
    return math.sqrt(sum(float(np.dot(part, part)) for part in wide))


def _parts(values: np.ndarray) -> list[np.ndarray]:
    return [values[start : start + CHUNK] for start in range(0, len(values), CHUNK)]
