"""Vectors that stay with the workers: a message names them instead of carrying them."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from fedsim.engine.sums import NotIn, Sums
from fedsim.engine.totals import BadReply, Expected
from fedsim.engine.work import Vector


@dataclass(frozen=True, kw_only=True)
class KeptParameters:
    """The parameters that each worker of a group holds.

    Attributes:
        group: Which workers these are (`fedsim.engine.collective.Meeting.name`).
        version: Steps that they have taken.
        size: How many values there are, P.
    """

    group: str
    version: int
    size: int

    @property
    def shape(self) -> tuple[int]:
        return (self.size,)


@dataclass(frozen=True, kw_only=True)
class KeptPart:
    """What one reply added to a sum, and what it told of the units in it.

    Attributes:
        name: Its worker knows it by this; no other part has the same.
        units: The units in it, int64.
        statistics, norms: As the reply told them (`fedsim.engine.work.Done`).
    """

    name: str
    units: np.ndarray
    statistics: dict[str, float]
    norms: np.ndarray


@dataclass(frozen=True, kw_only=True)
class KeptSum:
    """A clipped sum, in parts that workers keep. It adds up like the vector that it stands for.

    Attributes:
        parts: What it consists of.
        size: How many values it has, P.
        dtype: "int64" or "float32".
        norm: L2 norm, as the worker measured it when it checked the sum: of a part; of several, at most the sum of
            theirs.
    """

    parts: tuple[KeptPart, ...]
    size: int
    dtype: str
    norm: float

    @property
    def shape(self) -> tuple[int]:
        return (self.size,)

    @property
    def names(self) -> tuple[str, ...]:
        """Of its parts."""
        return tuple(part.name for part in self.parts)

    def __add__(self, other: "KeptSum") -> "KeptSum":
        return KeptSum(parts=self.parts + other.parts, size=self.size, dtype=self.dtype, norm=self.norm + other.norm)

    @classmethod
    def of_nobody(cls, expected: Expected) -> "KeptSum":
        """What there is before anybody has added to it."""
        return cls(parts=(), size=expected.size, dtype=expected.dtype, norm=0.0)

    def within(self, names: Collection[str]) -> "KeptSum":
        """What is left of it where only these parts are still held."""
        left = tuple(part for part in self.parts if part.name in names)
        return KeptSum(parts=left, size=self.size, dtype=self.dtype, norm=self.norm)


class KeptSums(Sums):
    """A round's sum whose parts stay with the workers that computed them: what each must be they look at themselves.

    Here it is compared with what they said: type, size, and the norm that they measured.
    """

    def __init__(self, expected: Expected) -> None:
        self._total = KeptSum.of_nobody(expected)

    def add(self, key: str, total: Vector, expected: Expected) -> None:
        """Take note of a part."""
        if not isinstance(total, KeptSum):
            raise BadReply("its sum comes where it was to stay")
        expected.check_form(total)
        expected.check_norm(total.norm)
        self._total += total

    def settle(self) -> dict[str, NotIn]:
        """Nothing is outstanding: what a worker loses with itself is found out when the sum is formed."""
        return {}

    def total(self) -> KeptSum:
        """All parts."""
        return self._total
