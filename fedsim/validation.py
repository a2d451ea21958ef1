"""Small checks of single values; each raises InvalidInput naming the field."""

import math

from fedsim.errors import InvalidInput


def require_positive(field: str, value: float) -> None:
    """0 < value < ∞; NaN is refused."""
    if not (value > 0 and math.isfinite(value)):
        raise InvalidInput(field, value, "a finite number above 0")


def require_at_least(field: str, value: float, least: float) -> None:
    """least ≤ value < ∞; NaN is refused."""
    if not (value >= least and math.isfinite(value)):
        raise InvalidInput(field, value, f"a number of at least {least:g}")


def require_at_most(field: str, value: float, most: float) -> None:
    """value ≤ most; NaN is refused."""
    if not value <= most:
        raise InvalidInput(field, value, f"a number of at most {most:,}")


def require_between(field: str, value: float, low: float, high: float) -> None:
    """low < value < high; NaN is refused."""
    if not low < value < high:
        raise InvalidInput(field, value, f"a number above {low:g} and below {high:g}")


def require_probability(field: str, value: float) -> None:
    """0 < value ≤ 1; NaN is refused."""
    if not 0 < value <= 1:
        raise InvalidInput(field, value, "a probability above 0 and at most 1")
