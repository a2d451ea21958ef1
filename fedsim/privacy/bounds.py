"""Kinds of numbers that are never mixed up: certified bounds, and estimates that certify nothing."""

import decimal
import math
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """A certified interval: the true value lies in [lower, upper].

    Attributes:
        lower: At most the true value. Shows how tight the upper bound is; never certifies a run.
        upper: At least the true value. The only number that certifies or calibrates; ∞ where nothing bounds it.
        tolerance: The gap that was asked for; ∞ where none was.
    """

    lower: float
    upper: float
    tolerance: float = field(default=math.inf, compare=False)

    def __post_init__(self) -> None:
        if not self.lower <= self.upper:
            raise ValueError(f"lower bound {self.lower} is above the upper bound {self.upper}")

    @property
    def gap(self) -> float:
        """(upper − lower)/upper; 0 when both are equal, 1 when only the upper one is infinite."""
        if self.lower == self.upper:
            return 0.0
        return 1.0 if math.isinf(self.upper) else (self.upper - self.lower) / self.upper

    @property
    def met(self) -> bool:
        """Whether the bounds are as close together as was asked for. Both are certified in either case."""
        return self.gap <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An approximation of unknown sign: a diagnostic. It has no upper or lower bound and calibrates nothing.

    Attributes:
        value: The approximation.
        method: What produced it.
    """

    value: float
    method: str


@dataclass(frozen=True, kw_only=True)
class LooseBound:
    """An upper bound by another method, without certified rounding: shown beside Bounds, never in their place.

    Attributes:
        value: The bound; inf where the method gives none.
        method: What produced it.
    """

    value: float
    method: str


def shown_above(value: float) -> str:
    """value with four significant digits, rounded up: what is shown is still an upper bound."""
    return _shown(value, decimal.ROUND_CEILING)


def shown_below(value: float) -> str:
    """value with four significant digits, rounded down: what is shown is still a lower bound."""
    return _shown(value, decimal.ROUND_FLOOR)


def _shown(value: float, rounding: str) -> str:
    if math.isinf(value):
        return "∞"
    exact = decimal.Decimal(value)
    return f"{exact.quantize(decimal.Decimal(1).scaleb(exact.adjusted() - 3), rounding=rounding).normalize():f}"
