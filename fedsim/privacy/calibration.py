"""Choose a parameter for a privacy target, from certified upper bounds alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import epsilon_against, epsilon_bounds
from fedsim.privacy.bounds import Bounds, shown_above
from fedsim.privacy.events import Adjacency, Event
from fedsim.validation import require_at_least, require_between, require_positive

ADD_OR_REMOVE = Adjacency.ADD_OR_REMOVE_ONE_USER
PRECISION = 1e-4
"""Relative precision of a calibrated real parameter."""
FALL = 2.1
"""About the power of the noise multiplier with which ε falls, by which a search that begins near takes its steps."""
STRAIGHT, PATIENCE = 1.0, 12
"""Such a search takes no middle of brackets this short, in which log ε is all but straight, unless it has looked so
often."""
BEYOND, FARTHEST = 1.02, 4.0
"""How far beyond where that power would meet the target the step goes, so that it meets it, and how far at most."""
LEAST_NOISE, MOST_NOISE = 1e-2, 1e9


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A parameter that meets a privacy target.

    Attributes:
        value: The parameter.
        epsilon: What it achieves; epsilon.upper is at most the target. Where epsilon.met is false, the bounds are
            farther apart than the tolerance, and a value closer to the target may exist.
    """

    value: float
    epsilon: Bounds


def calibrate_noise_multiplier(
    make_event: Callable[[float], Event],
    *,
    epsilon: float,
    delta: float,
    adjacency: Adjacency = ADD_OR_REMOVE,
    tolerance: float = 1e-3,
    precision: float = PRECISION,
    near: float | None = None,
) -> Calibration:
    """The least noise multiplier, to a relative precision, whose ε upper bound at delta is at most epsilon.

    Args:
        make_event: The event for a noise multiplier; its ε must fall as the noise multiplier grows.
        epsilon: The target.
        delta: δ of the target.
        adjacency: Which data sets count as neighbours.
        tolerance: Relative distance of upper and lower bounds.
        precision: How far the value may be above the least one, relatively.
        near: Where the value is expected, which is where the search begins: a good guess saves half of it.

    Raises:
        InvalidInput: If no noise multiplier up to 1e9 meets the target.
    """
    start, fall = (1.0, None) if near is None else (near, FALL)
    search = _Search(make_event, epsilon, delta, adjacency, tolerance, precision, fall)
    return search.real(safe=MOST_NOISE, unsafe=LEAST_NOISE, start=start, name="noise multiplier")


def calibrate_sampling_probability(
    make_event: Callable[[float], Event],
    *,
    epsilon: float,
    delta: float,
    adjacency: Adjacency = ADD_OR_REMOVE,
    tolerance: float = 1e-3,
) -> Calibration:
    """The largest sampling probability, to a relative 1e-4, that meets the target; arguments as for the noise."""
    search = _Search(make_event, epsilon, delta, adjacency, tolerance)
    return search.real(safe=1e-9, unsafe=1.0, start=1e-2, name="sampling probability")


def calibrate_steps(
    make_event: Callable[[int], Event],
    *,
    epsilon: float,
    delta: float,
    adjacency: Adjacency = ADD_OR_REMOVE,
    tolerance: float = 1e-3,
    most: int = 10_000_000,
) -> Calibration:
    """The largest number of steps, at most `most`, that meets the target; arguments as for the noise."""
    return _Search(make_event, epsilon, delta, adjacency, tolerance).whole(most, "number of steps")


def calibrate_group_size(
    make_event: Callable[[int], Event],
    *,
    epsilon: float,
    delta: float,
    adjacency: Adjacency = ADD_OR_REMOVE,
    tolerance: float = 1e-3,
    most: int = 4096,
) -> Calibration:
    """The largest group size, at most `most`, that meets the target; arguments as for the noise."""
    return _Search(make_event, epsilon, delta, adjacency, tolerance).whole(most, "group size")


class _Search:
    """Evaluations of ε's upper bound at values of the parameter, each made once.

    Attributes:
        fall: About the power of the value with which ε falls; None where nobody knows.
        known: Bounds on ε at the values looked at so far.
    """

    def __init__(
        self,
        make_event: Callable[[Any], Event],
        epsilon: float,
        delta: float,
        adjacency: Adjacency,
        tolerance: float,
        precision: float = PRECISION,
        fall: float | None = None,
    ):
        require_positive("epsilon", epsilon)
        require_between("delta", delta, 0, 1)
        self.make_event = make_event
        self.target = epsilon
        self.delta = delta
        self.adjacency = adjacency
        self.tolerance = tolerance
        self.precision = precision
        self.fall = fall
        self.known: dict[float, Bounds] = {}

    def at(self, value: float) -> Bounds:
        if value not in self.known:
            # A bisection asks on which side of the target ε lies; steps along the curve ask for ε.
            threshold = self.target if self.fall is None else np.nan
            self.known[value] = epsilon_against(
                self.make_event(value), self.delta, threshold, adjacency=self.adjacency, tolerance=self.tolerance
            )
        return self.known[value]

    def found(self, value: float) -> Calibration:
        """The value, with bounds as close as the tolerance asks."""
        rough, event = self.at(value), self.make_event(value)
        if rough.gap <= self.tolerance:
            return Calibration(
                value=value, epsilon=Bounds(lower=rough.lower, upper=rough.upper, tolerance=self.tolerance)
            )
        close = epsilon_bounds(event, self.delta, adjacency=self.adjacency, tolerance=self.tolerance)
        both = Bounds(
            lower=max(rough.lower, close.lower), upper=min(rough.upper, close.upper), tolerance=self.tolerance
        )
        return Calibration(value=value, epsilon=both)

    def meets(self, value: float) -> bool:
        return self.at(value).upper <= self.target

    def close(self, value: float) -> bool:
        """Whether a value that meets the target is known to be within the precision of the best.

        Where ε falls at least as fast as the value's inverse, ε need only be as close to the target. How fast it falls
        is seen at the nearest value that was looked at: what is composed with releases that no noise of this one
        changes hardly falls at all.
        """
        others = [other for other in self.known if other != value]
        if self.fall is None or self.at(value).gap > self.tolerance or not others:
            return False
        nearest = min(others, key=lambda other: abs(math.log(other / value)))
        fall = (self.miss(nearest) - self.miss(value)) / math.log(value / nearest)
        return self.miss(value) >= -self.precision * min(fall, 1.0)

    def miss(self, value: float) -> float:
        """How far above the target ε's upper bound is, in logarithms."""
        return float(np.log(max(self.at(value).upper, 1e-300) / self.target))

    def real(self, *, safe: float, unsafe: float, start: float, name: str) -> Calibration:
        """Bisect the logarithm between a value that meets the target and one that does not.

        Args:
            safe, unsafe: The farthest value that may meet the target, and the farthest that may not.
            start: Where the search begins.
            name: Of the parameter, for the error.
        """
        inner, up, strides = start, safe > unsafe, 0
        if self.meets(inner):
            while self.meets(inner):
                if self.close(inner):
                    return self.found(inner)
                factor, strides = self.step(inner, strides), strides + 1
                safe, inner = inner, inner / factor if up else inner * factor
                if (inner - unsafe) * (safe - unsafe) <= 0:
                    if self.meets(unsafe):
                        return self.found(unsafe)
                    inner = unsafe
                    break
            unsafe = inner
        else:
            outermost = safe
            while not self.meets(inner):
                if inner == outermost:
                    raise self.impossible(outermost, name)
                factor, strides = self.step(inner, strides), strides + 1
                unsafe, inner = inner, min(inner * factor, outermost) if up else max(inner / factor, outermost)
            safe = inner
        while abs(np.log(safe / unsafe)) > self.precision and not self.close(safe):
            middle = self.between(safe, unsafe)
            if self.meets(middle):
                safe = middle
            else:
                unsafe = middle
        return self.found(safe)

    def step(self, value: float, strides: int) -> float:
        """How far from a value the next one is looked for, as a factor above 1, after so many steps to the same side.

        Where the curve is flatter than expected each step is longer than the last.
        """
        if self.fall is None or not 0 < self.at(value).upper < np.inf:
            return 2.0
        return float(min(BEYOND**2 ** min(strides, 8) * np.exp(abs(self.miss(value)) / self.fall), FARTHEST))

    def between(self, safe: float, unsafe: float) -> float:
        """A value inside the bracket near the one that meets the target exactly: log ε is nearly linear in its log.

        It stops a little on the far side of the crossing, so that the longer end of the bracket moves; every third
        value is the middle, so that the bracket shrinks whatever the curve. Of a curve that is known to be straight
        the middle is not taken of a short bracket, and the value is one that meets the target.
        """
        ends, misses = np.log([safe, unsafe]), np.array([self.miss(safe), self.miss(unsafe)])
        straight = self.fall is not None and abs(ends[0] - ends[1]) < STRAIGHT and len(self.known) < PATIENCE
        if not np.isfinite(misses).all() or misses[0] == misses[1] or (len(self.known) % 3 == 0 and not straight):
            return float(np.exp(ends.mean()))
        crossing = ends[0] - misses[0] * (ends[1] - ends[0]) / (misses[1] - misses[0])
        if straight:
            step = 0.6 * self.precision * (ends[0] - ends[1]) / (misses[1] - misses[0])
        else:
            longer = ends[np.argmax(np.abs(ends - crossing))]
            step = 0.4 * self.precision * np.sign(longer - crossing)
        low, high = sorted(ends)
        margin = 0.1 * self.precision
        return float(np.exp(np.clip(crossing + step, low + margin, high - margin)))

    def whole(self, most: int, name: str) -> Calibration:
        require_at_least("most", most, 1)
        if not self.meets(1):
            raise self.impossible(1, name)
        low, high = 1, 2
        while high <= most and self.meets(high):
            low, high = high, 2 * high
        high = min(high, most + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.meets(middle) else (low, middle)
        return self.found(low)

    def impossible(self, value: float, name: str) -> InvalidInput:
        certified = self.found(value).epsilon.upper
        least = "larger: none could be bounded" if np.isinf(certified) else f"at least {shown_above(certified)}"
        return InvalidInput(
            "epsilon",
            self.target,
            f"{least}, what a {name} of {value:g} is certified to have at δ = {self.delta:g}",
            "Allow a larger ε or δ, or change what else is given.",
        )
