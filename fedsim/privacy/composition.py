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
OUTSIDE = 24.0
"""Minus the log of the tilted mass that may fall outside the window."""


def log_moment(parts: Parts, tilt: float) -> float:
    """log E[e^{tilt·S}] of the composed loss S, on finite losses."""
    return sum(count * _log_moment(measure, tilt) for measure, count in parts)


def _log_moment(measure: GridMeasure, tilt: float) -> float:
    exponents = tilt * measure.losses + measure.log_masses
    largest = exponents.max()
    return float(largest + np.log(np.exp(exponents - largest).sum()))


def log_kernel(tilt: float) -> float:
    """log max_y e^{−tilt·y}(1 − e^{−y})."""
    return tilt * np.log(tilt / (1 + tilt)) - np.log1p(tilt) if tilt > 0 else 0.0


def best_tilt(
    parts: Parts, *, epsilon: float | None = None, delta: float | None = None, near: float | None = None
) -> tuple[float, float]:
    """The tilt whose Chernoff bound is best, and that bound: on log δ for a given ε, or on ε for a given δ.

    The bound is for the measures as they are, without their shifts and infinite masses.

    Args:
        parts: What is composed.
        epsilon: ε, where δ is asked for.
        delta: δ, where ε is asked for.
        near: A tilt to look around; without it every magnitude is tried.
    """

    def bound(log_tilt: float) -> float:
        tilt = float(np.exp(log_tilt))
        value = log_moment(parts, tilt) + log_kernel(tilt)
        return value - tilt * epsilon if delta is None else (value - np.log(delta)) / tilt  # type: ignore[operator]

    coarse = np.linspace(-9, 20, 30) if near is None else np.log(near) + np.array([-0.1, 0, 0.1])
    values = [bound(point) for point in coarse]
    middle = int(np.argmin(values))
    if near is not None:
        return float(np.exp(coarse[middle])), values[middle]
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
class Window:
    """Where the composed, tilted loss lies, but for e^{−OUTSIDE}; and the tilts that prove it."""

    tilt: float
    low: float
    high: float
    tilt_low: float
    tilt_high: float


def find_window(parts: Parts, tilt: float, epsilon: float) -> Window:
    """The window of losses for a tilt, which includes epsilon."""
    base = log_moment(parts, tilt)
    step = 1e-3 * max(tilt, 1e-3)
    around = [log_moment(parts, tilt + sign * step) for sign in (-1, 1)]
    deviation = np.sqrt(max((around[0] + around[1] - 2 * base) / step**2, 1e-300))
    scales = np.array([0.3, 1, 2, 3, 4, 5, 6, 8, 12]) / max(deviation, parts[0][0].spacing)
    highs = [(log_moment(parts, tilt + t) - base + OUTSIDE) / t for t in scales]
    lows = [-(log_moment(parts, tilt - t) - base + OUTSIDE) / t for t in scales]
    spacing = parts[0][0].spacing
    return Window(
        tilt=tilt,
        low=min(max(lows), epsilon - 2 * spacing),
        high=max(min(highs), epsilon + 2 * spacing),
        tilt_low=float(scales[int(np.argmax(lows))]),
        tilt_high=float(scales[int(np.argmin(highs))]),
    )


def compose(parts: Parts, window: Window, epsilon: float) -> ComposedTail:
    """δ on the grid within the window, the composed measure's and nothing added for its direction."""
    spacing = parts[0][0].spacing
    tilt = window.tilt
    origin = sum(count * measure.origin for measure, count in parts)
    start = int(np.floor((window.low - origin) / spacing))
    size = next_fast_len(int(np.ceil((window.high - window.low) / spacing)) + 3, real=True)
    base = 0.0
    log_size = np.zeros(size // 2 + 1)
    phase = np.zeros(size // 2 + 1)
    relative = np.zeros(size // 2 + 1)
    for measure, count in parts:
        moment = _log_moment(measure, tilt)
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
    outside = np.exp(log_moment(parts, tilt + window.tilt_high) - base - window.tilt_high * window.high)
    outside += np.exp(log_moment(parts, tilt - window.tilt_low) - base + window.tilt_low * window.low)
    losses = origin + spacing * (start + np.arange(size))
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
    return np.pad(values, (0, rows * size - len(values))).reshape(rows, size).sum(axis=0)
