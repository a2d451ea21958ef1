"""Composition of grid measures by FFT under exponential tilting, with every error bounded.

Multiplying a measure by e^{θ·loss} and normalising moves its mass to where the tail of interest lies. The T-fold
convolution of the tilted measure is the tilted T-fold convolution, so that the FFT's absolute rounding error becomes
a relative error of δ, however small δ is. δ(ε) = e^K ∫_{s>ε} e^{−θs} (1 − e^{ε−s}) dF_θ(s), K the log of the product
of the normalisers, and the kernel never exceeds e^{K−θε}·θ^θ/(1+θ)^{1+θ}: this turns a bound on misplaced tilted mass
into a bound on δ.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.optimize import minimize_scalar

from fedsim.privacy.loss_cells import GridMeasure

Floats = NDArray[np.float64]
Parts = Sequence[tuple[GridMeasure, int]]
EPS = float(np.finfo(float).eps)
MARGIN = 13.0
"""Minus the log of the part of δ that may fall outside the window, on either side."""
SHARES = (1.0, 0.8, 0.65, 0.5, 0.35)
"""Parts of the best tilt that are tried for a narrower window."""
ROUNDING = 5e-13
"""About what one FFT's rounding misplaces of the tilted mass, for each release."""


LARGEST = 300.0
"""Log of the largest δ, times whatever it takes to reach it, that a curve is followed down to."""


def log_moments(parts: Parts, tilts: Floats) -> Floats:
    """log E[e^{tilt·S}] of the composed loss S, on finite losses, for each tilt."""
    return np.asarray(np.sum([count * _log_moments(measure, tilts) for measure, count in parts], axis=0))


def log_moment(parts: Parts, tilt: float) -> float:
    """log E[e^{tilt·S}] of the composed loss S, on finite losses."""
    return float(log_moments(parts, np.array([tilt]))[0])


def _log_moments(measure: GridMeasure, tilts: Floats) -> Floats:
    moments = np.empty(len(tilts))
    exponents = np.empty_like(measure.losses)
    for place, tilt in enumerate(tilts):
        np.multiply(measure.losses, tilt, out=exponents)
        exponents += measure.log_masses
        largest = exponents.max()
        exponents -= largest
        moments[place] = largest + np.log(np.exp(exponents, out=exponents).sum())
    return moments


def log_kernel(tilt: float) -> float:
    """log max_y e^{−tilt·y}(1 − e^{−y})."""
    return tilt * np.log(tilt / (1 + tilt)) - np.log1p(tilt) if tilt > 0 else 0.0


def best_tilt(parts: Parts, *, epsilon: float | None = None, delta: float | None = None) -> tuple[float, float]:
    """The tilt whose Chernoff bound is best, and that bound: on log δ for a given ε, or on ε for a given δ.

    The bound is for the measures as they are, without their shifts and infinite masses.

    Args:
        parts: What is composed.
        epsilon: ε, where δ is asked for.
        delta: δ, where ε is asked for.
    """

    def bound(log_tilt: float) -> float:
        tilt = float(np.exp(log_tilt))
        value = log_moment(parts, tilt) + log_kernel(tilt)
        return value - tilt * epsilon if delta is None else (value - np.log(delta)) / tilt  # type: ignore[operator]

    coarse = np.linspace(-9, 20, 30)
    middle = int(np.argmin([bound(point) for point in coarse]))
    around = (coarse[middle] - 1, coarse[middle] + 1)
    found = minimize_scalar(bound, bounds=around, method="bounded", options={"xatol": 1e-2})
    return float(np.exp(found.x)), float(found.fun)


@dataclass(frozen=True)
class ComposedTail:
    """δ at the losses of a window, with a bound on each one's error."""

    losses: Floats
    deltas: Floats
    errors: Floats

    def moved(self, shift: float, added: Floats) -> "ComposedTail":
        """The curve at losses moved by shift, with something added to δ."""
        return ComposedTail(self.losses + shift, self.deltas + added, self.errors)


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


def choose_tilts(parts: Parts, best: float, epsilon: float, log_delta: float) -> Tilts:
    """The tilts with the narrowest window, of those that keep rounding small against δ.

    The tilt of the best Chernoff bound may put much of the mass of a heavy-tailed loss far above ε. A smaller one asks
    for less mass outside the window, yet its window is narrower.

    Args:
        parts: What is composed; a coarse grid will do.
        best: The tilt of the best Chernoff bound.
        epsilon: About where on the curve the answer lies.
        log_delta: log δ there.
    """
    turns = sum(count for _, count in parts)
    tilts = best * np.array(SHARES)
    bases = log_moments(parts, tilts)
    # Log of how much an error of the tilted mass grows, relative to δ.
    growths = bases + [log_kernel(tilt) for tilt in tilts] - tilts * epsilon - log_delta
    fit = growths <= max(-np.log(1e4 * ROUNDING * turns), growths.min() + 1.5)
    choices = [
        _widths(parts, tilt, base, max(growth, 0.0) + MARGIN)
        for tilt, base, growth in zip(tilts[fit], bases[fit], growths[fit], strict=True)
    ]
    return min(choices, key=lambda choice: find_window(parts, choice, epsilon).width)


def _widths(parts: Parts, tilt: float, base: float, outside: float) -> Tilts:
    """The tilts on either side that prove the narrowest window."""
    step = 1e-3 * max(tilt, 1e-3)
    around = log_moments(parts, np.array([tilt - step, tilt + step]))
    deviation = np.sqrt(max((around.sum() - 2 * base) / step**2, 1e-300))
    scales = np.array([0.3, 1, 2, 3, 4, 5, 6, 8, 12]) / max(deviation, parts[0][0].spacing)
    highs = (log_moments(parts, tilt + scales) - base + outside) / scales
    lows = -(log_moments(parts, tilt - scales) - base + outside) / scales
    return Tilts(float(tilt), float(scales[np.argmax(lows)]), float(scales[np.argmin(highs)]), outside)


def find_window(parts: Parts, tilts: Tilts, epsilon: float) -> Window:
    """The window of losses for the tilts, which includes epsilon."""
    low, base, high = log_moments(parts, tilts.middle + np.array([-tilts.low, 0.0, tilts.high]))
    spacing = parts[0][0].spacing
    return Window(
        tilts=tilts,
        low=min(-(low - base + tilts.outside) / tilts.low, epsilon - 2 * spacing),
        high=max((high - base + tilts.outside) / tilts.high, epsilon + 2 * spacing),
    )


def compose(parts: Parts, window: Window, epsilon: float) -> ComposedTail:
    """δ on the grid within the window, the composed measure's and nothing added for its direction."""
    spacing = parts[0][0].spacing
    tilts, tilt = window.tilts, window.tilts.middle
    origin = sum(count * measure.origin for measure, count in parts)
    start = int(np.floor((window.low - origin) / spacing))
    size = next_fast_len(int(np.ceil(window.width / spacing)) + 3, real=True)
    base = 0.0
    log_size = np.zeros(size // 2 + 1)
    phase = np.zeros(size // 2 + 1)
    relative = np.zeros(size // 2 + 1)
    for measure, count in parts:
        moment = float(_log_moments(measure, np.array([tilt]))[0])
        base += count * moment
        tilted = np.exp(measure.log_masses + tilt * measure.losses - moment)
        transform = rfft(_folded(tilted, size))
        size_of = np.abs(transform)
        farthest = float(np.abs(measure.losses[[0, -1]]).max())
        logs = -float(tilted @ np.maximum(measure.log_masses, -745))
        slip = 8 * EPS * np.log2(size) + 4 * EPS * (1 + abs(moment) + tilt * farthest + logs)
        with np.errstate(divide="ignore"):
            log_size += count * np.log(size_of + slip)
            relative += count * np.log1p(slip / size_of)
        phase += np.remainder(count * np.angle(transform), 2 * np.pi) + 0.0
    turns = sum(count for _, count in parts)
    spectrum = np.exp(log_size - relative)
    doubt = np.exp(log_size) * (-np.expm1(-relative) + 8 * EPS * (turns * 4 + 4))
    tilted_mass = irfft(spectrum * np.exp(1j * phase), size)
    tilted_mass = np.roll(tilted_mass, -(start % size))
    # Parseval and Cauchy–Schwarz: an error's absolute sum in time is at most the root of its squares in frequency.
    misplaced = np.sqrt(2) * (np.linalg.norm(doubt) + 8 * EPS * np.log2(size) * np.linalg.norm(np.exp(log_size)))
    below, above = log_moments(parts, tilt + np.array([-tilts.low, tilts.high]))
    outside = np.exp(above - base - tilts.high * window.high) + np.exp(below - base + tilts.low * window.low)
    losses = origin + spacing * (start + np.arange(size))
    # Only a target guessed far too low needs this; the curve then begins above it.
    epsilon = max(epsilon, (base - LARGEST) / tilt)
    return _deltas(losses, tilted_mass, tilt, base, float(misplaced + outside), epsilon)


def _deltas(losses: Floats, mass: Floats, tilt: float, base: float, misplaced: float, epsilon: float) -> ComposedTail:
    kept = (1 + tilt) * (losses - epsilon) > -300
    losses, mass = losses[kept], mass[kept]
    away = losses - epsilon
    scale = base - tilt * epsilon
    heavy = _above(mass * np.exp(-tilt * away))
    light = _above(mass * np.exp(-(1 + tilt) * away)) * np.exp(np.minimum(away, 300))
    deltas = np.exp(scale) * (heavy - light)
    errors = np.exp(scale - tilt * away + log_kernel(tilt)) * misplaced
    errors += np.exp(scale) * 2 * len(mass) * EPS * (np.abs(heavy) + np.abs(light))
    # Far above the target the second sum has underflowed; it lies between 0 and the first.
    errors += np.where(away > 300, np.exp(scale) * np.abs(heavy), 0.0)
    return ComposedTail(losses, deltas, errors)


def _above(values: Floats) -> Floats:
    """For each place the sum of all later values, smallest first."""
    sums = np.cumsum(values[::-1])[::-1]
    return np.append(sums[1:], 0.0)


def _folded(values: Floats, size: int) -> Floats:
    rows = -(-len(values) // size)
    folded: Floats = np.pad(values, (0, rows * size - len(values))).reshape(rows, size).sum(axis=0)
    return folded
