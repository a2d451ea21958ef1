"""Exponential tilting of a composed loss: where its tail lies, what Chernoff says of it, and which window holds it.

Everything here needs log-moments alone, so a sketch of each loss will do for planning. What is proved with moments of
the measures that are composed is proved: `chernoff` and `find_window`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
EPS = float(np.finfo(float).eps)
MARGIN = 13.0
"""Minus the log of the part of δ that may fall outside the window, on either side."""
SHARES = (1.0, 0.8, 0.65, 0.5, 0.35)
"""Parts of the best tilt that are tried for a narrower window."""
ROUNDING = 5e-13
"""About what one FFT's rounding misplaces of the tilted mass, for each release."""
SCALES = np.array([0.3, 1, 2, 3, 4, 5, 6, 8, 12])
"""Steps away from a tilt, in units of the tilted deviation's inverse, that are tried for a window's proof."""
LOG_TILTS = np.linspace(-40, 24, 33)
ZOOMS = (np.linspace(-2, 2, 17), np.linspace(-1 / 4, 1 / 4, 9), np.linspace(-1 / 16, 1 / 16, 9))
"""Steps of log tilt around the best so far: the last are 1/64 apart."""
TABLE = 400_000
"""Numbers of a table of tilts and losses that is formed at once."""


class Atoms(Protocol):
    """A loss with finitely many values.

    Attributes of it:
        losses: The finite values.
        log_masses: Log-probability of each.
        infinite: Probability of loss ∞.
        shift: To be added to each loss before use: what rounding can have moved.
    """

    @property
    def losses(self) -> Floats: ...

    @property
    def log_masses(self) -> Floats: ...

    @property
    def infinite(self) -> float: ...

    @property
    def shift(self) -> float: ...


Composition = Sequence[tuple[Atoms, int]]
"""Losses that are added up, and how many independent copies of each."""


def log_moments(parts: Composition, tilts: Floats) -> Floats:
    """log E[e^{tilt·S}] of the composed loss S, on finite losses, for each tilt; NaN where that is beyond floats."""
    return np.asarray(np.sum([count * log_moments_once(measure, tilts) for measure, count in parts], axis=0))


def log_moments_once(measure: Atoms, tilts: Floats) -> Floats:
    """The same for one loss."""
    pieces = max(-(-len(tilts) * len(measure.losses) // TABLE), 1)
    return np.concatenate([_log_moments_together(measure, piece) for piece in np.array_split(tilts, pieces)])


def _log_moments_together(measure: Atoms, tilts: Floats) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):
        exponents = np.multiply.outer(tilts, measure.losses)
        exponents += measure.log_masses
        largest = exponents.max(axis=1)
        exponents -= largest[:, None]
        return np.asarray(largest + np.log(np.exp(exponents, out=exponents).sum(axis=1)))


def tilted_deviation(parts: Composition, tilt: float) -> float:
    """Standard deviation of the composed loss under a tilt."""
    variance = 0.0
    for measure, count in parts:
        exponents = measure.log_masses + tilt * measure.losses
        weights = np.exp(exponents - exponents.max())
        weights /= weights.sum()
        variance += count * float(weights @ (measure.losses - weights @ measure.losses) ** 2)
    return float(np.sqrt(variance))


def log_kernels(tilts: Floats) -> Floats:
    """log max_y e^{−tilt·y}(1 − e^{−y}) for each tilt, 0 for those that are not positive."""
    positive = np.maximum(tilts, 1e-300)
    return np.where(tilts > 0, -positive * np.log1p(1 / positive) - np.log1p(positive), 0.0)


def log_kernel(tilt: float) -> float:
    """The same for one tilt."""
    return float(log_kernels(np.array([tilt]))[0])


def best_tilt(parts: Composition, *, epsilon: float | None = None, delta: float | None = None) -> tuple[float, float]:
    """The tilt whose Chernoff bound is best, and that bound: on log δ for a given ε, or on ε for a given δ.

    δ(ε) ≤ e^{K(θ)−θε}·θ^θ/(1+θ)^{1+θ} for every θ > 0, K the composed log-moment. The bound is for the measures as
    they are: `chernoff` adds their shifts, infinite masses and rounding.

    Args:
        parts: What is composed.
        epsilon: ε, where δ is asked for.
        delta: δ, where ε is asked for.
    """

    def bounds(log_tilts: Floats) -> Floats:
        tilts = np.exp(log_tilts)
        values = log_moments(parts, tilts) + log_kernels(tilts)
        return values - tilts * epsilon if delta is None else (values - np.log(delta)) / tilts

    tried, found = LOG_TILTS, bounds(LOG_TILTS)
    for steps in ZOOMS:
        tried = tried[np.argmin(found)] + steps
        found = bounds(tried)
    best = int(np.argmin(found))
    return float(np.exp(tried[best])), float(found[best])


def chernoff(parts: Composition, tilt: float, *, epsilon: float | None = None, delta: float | None = None) -> float:
    """The Chernoff bound of a tilt as a certified one: on δ for a given ε, at most 1, or on ε for a given δ.

    Infinite only where the probability of an infinite loss reaches δ.
    """
    endless = infinite_mass(parts)
    moment = float(log_moments(parts, np.array([tilt]))[0]) + log_kernel(tilt) + moment_rounding(parts, tilt)
    shift = sum(count * measure.shift for measure, count in parts)
    if delta is None:
        log_delta = moment - tilt * (float(epsilon or 0.0) - shift)
        return min(float(np.exp(min(log_delta, 0.0))) * (1 + 1e-12) + endless, 1.0)
    if endless >= delta:
        return np.inf
    value = (moment - np.log(delta - endless)) / tilt + shift
    return float(max(value + 1e-12 * abs(value), 0.0))


def moment_rounding(parts: Composition, tilt: float) -> float:
    """Bound on the rounding error of the composed log-moment."""
    total = 0.0
    for measure, count in parts:
        farthest = float(np.abs(measure.losses[[0, -1]]).max())
        total += count * EPS * (16 + 8 * tilt * farthest)
    return total


def infinite_mass(parts: Composition) -> float:
    """Probability that the composed loss is infinite."""
    each = [count * np.log1p(-min(measure.infinite, 1.0)) for measure, count in parts if measure.infinite < 1]
    return float(-np.expm1(sum(each))) if len(each) == len(parts) else 1.0


@dataclass(frozen=True)
class Tilts:
    """How to tilt a composition, and which tilts prove where its mass lies.

    Attributes:
        middle: The tilt of the mass that is composed.
        low: How far below it the tilt lies that bounds the mass below the window.
        high: How far above it the tilt lies that bounds the mass above the window.
        outside: Minus the log of the tilted mass that may lie outside the window, on either side.
    """

    middle: float
    low: float
    high: float
    outside: float


@dataclass(frozen=True)
class Window:
    """Where the composed, tilted loss lies, but for e^{−tilts.outside} on either side."""

    tilts: Tilts
    low: float
    high: float

    @property
    def width(self) -> float:
        """Length of the window."""
        return self.high - self.low


def choose_tilts(parts: Composition, best: float, epsilon: float, log_delta: float) -> Tilts:
    """The tilts with the narrowest window, of those that keep rounding small against δ.

    The tilt of the best Chernoff bound may put much of the mass of a heavy-tailed loss far above ε. A smaller one asks
    for less mass outside the window, yet its window is narrower.

    Args:
        parts: What is composed; a sketch will do.
        best: The tilt of the best Chernoff bound.
        epsilon: About where on the curve the answer lies.
        log_delta: log δ there.
    """
    turns = sum(count for _, count in parts)
    tilts = best * np.array(SHARES)
    bases = log_moments(parts, tilts)
    # Log of how much an error of the tilted mass grows, relative to δ.
    growths = bases + log_kernels(tilts) - tilts * epsilon - log_delta
    fit = growths <= max(-np.log(1e4 * ROUNDING * turns), growths.min() + 1.5)
    choices = [
        provable(parts, float(tilt), max(growth, 0.0) + MARGIN)
        for tilt, growth in zip(tilts[fit], growths[fit], strict=True)
    ]
    return min(choices, key=lambda choice: find_window(parts, choice, epsilon).width)


def provable(parts: Composition, tilt: float, outside: float, *, least: float = 0.0) -> Tilts:
    """The tilts on either side, each at least `least` away, that prove the narrowest window; a sketch will do."""
    base = log_moments(parts, np.array([tilt]))[0]
    scales = SCALES / max(tilted_deviation(parts, tilt), 1e-300)
    highs = (log_moments(parts, tilt + scales) - base + outside) / scales
    downwards = np.maximum(scales, least)
    lows = -(log_moments(parts, tilt - downwards) - base + outside) / downwards
    return Tilts(tilt, float(downwards[np.argmax(lows)]), float(scales[np.argmin(highs)]), outside)


def find_window(parts: Composition, tilts: Tilts, epsilon: float | None = None) -> Window:
    """The window of losses for the tilts, which includes epsilon where one is given."""
    low, base, high = log_moments(parts, tilts.middle + np.array([-tilts.low, 0.0, tilts.high]))
    ends = -(low - base + tilts.outside) / tilts.low, (high - base + tilts.outside) / tilts.high
    included = ends if epsilon is None else (*ends, epsilon)
    return Window(tilts=tilts, low=float(min(included)), high=float(max(included)))
