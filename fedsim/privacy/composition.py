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
import scipy
from numpy.typing import NDArray

from fedsim.privacy.loss_cells import Floats, GridMeasure
from fedsim.privacy.recursion import recursion
from fedsim.privacy.tilting import EPS, Window, infinite_mass, log_kernel, log_moments, log_moments_once

Parts = Sequence[tuple[GridMeasure, int]]
"""Measures on grids of one spacing, and how many independent copies of each are added up."""
Spectrum = NDArray[np.complex128]
AT_ONCE = 2**13
"""Frequencies whose product is formed together: their intermediate results stay in a processor's cache."""
LEAST = -746.0
"""Log of what a float holds as 0."""
LARGEST = 300.0
"""Log of the largest δ, times whatever it takes to reach it, that a curve is followed down to."""


@dataclass(frozen=True)
class TiltedMass:
    """The tilted mass of a composed loss on a window, wrapped around at its ends.

    Attributes:
        losses: The window's losses, evenly spaced.
        masses: Tilted mass at each; rounding can leave it slightly below 0.
        base: The log-moment that the masses were normalised by.
        misplaced: Bound on the sum of the absolute rounding errors of the masses.
        doubt: Bound on the rounding error of each mass.
    """

    losses: Floats
    masses: Floats
    base: float
    misplaced: float
    doubt: float


def convolve(parts: Parts, tilt: float, low: float, high: float, *, multiple: int = 1) -> TiltedMass:
    """The tilted mass of the composed loss between low and high, all of it wrapped into this window.

    Args:
        parts: What is composed.
        tilt: θ.
        low: Where the window begins, at the latest.
        high: Where it ends, at the earliest.
        multiple: The window's size is a multiple of this.
    """
    spacing = parts[0][0].spacing
    origin = sum(count * measure.origin for measure, count in parts)
    start = int(np.floor((low - origin) / spacing)) - 2
    cells = int(np.ceil((high - low) / spacing)) + 7
    size = multiple * scipy.fft.next_fast_len(-(-cells // multiple), real=True)
    base = 0.0
    spectra = []
    for measure, count in parts:
        moment = float(log_moments_once(measure, np.array([tilt]))[0])
        base += count * moment
        tilted = np.exp(measure.log_masses + tilt * measure.losses - moment)
        farthest = float(np.abs(measure.losses[[0, -1]]).max())
        logs = float(tilted @ np.abs(np.maximum(measure.log_masses, -1e9)))
        slip = 8 * EPS * np.log2(size) + 4 * EPS * (1 + abs(moment) + tilt * farthest + logs)
        spectra.append((scipy.fft.rfft(_folded(tilted, size)), slip, count))
    product, bound, doubt = _product(spectra)
    masses = np.roll(scipy.fft.irfft(product, size), -(start % size))
    # An error of a transform spreads over all places. Its absolute sum in time is at most the root of its squares in
    # frequency (Parseval and Cauchy–Schwarz), and at each place at most the mean of its absolute values.
    rounding = 8 * EPS * np.log2(size) * np.linalg.norm(bound)
    return TiltedMass(
        losses=origin + spacing * (start + np.arange(size)),
        masses=masses,
        base=base,
        misplaced=float(np.sqrt(2) * (np.linalg.norm(doubt) + rounding)),
        doubt=float(2 * doubt.sum() / size + np.sqrt(2 / size) * rounding),
    )


def _product(spectra: Sequence[tuple[Spectrum, float, int]]) -> tuple[Spectrum, Floats, Floats]:
    """The product of powers of transforms at each frequency, a bound on its size, and one on its error.

    Of many releases little is left but at low frequencies; where a float holds none of it, nothing more is computed.

    Args:
        spectra: Each transform, a bound on the rounding error of each of its values, and its power.
    """
    frequencies = len(spectra[0][0])
    turns = sum(count for *_, count in spectra)
    product = np.zeros(frequencies, dtype=np.complex128)
    bound, doubt = np.zeros(frequencies), np.zeros(frequencies)
    for begin in range(0, frequencies, AT_ONCE):
        place = slice(begin, begin + AT_ONCE)
        sizes = [np.abs(transform[place]) for transform, _, _ in spectra]
        log_size = np.zeros(len(sizes[0]))
        for size_of, (_, slip, count) in zip(sizes, spectra, strict=True):
            log_size += count * np.log(size_of + slip)
        live = np.flatnonzero(~(log_size <= LEAST))  # what is not a number must show in the bound
        if len(live) == 0:
            continue
        log_size, relative, phase = log_size[live], np.zeros(len(live)), np.zeros(len(live))
        for size_of, (transform, slip, count) in zip(sizes, spectra, strict=True):
            with np.errstate(divide="ignore"):
                relative += count * np.log1p(slip / size_of[live])
            phase += np.remainder(count * np.angle(transform[place][live]), 2 * np.pi)
        bound[begin + live] = np.exp(log_size)
        doubt[begin + live] = bound[begin + live] * (-np.expm1(-relative) + 8 * EPS * (turns * 4 + 4))
        product[begin + live] = np.exp(log_size - relative) * np.exp(1j * phase)
    return product, bound, doubt


@dataclass(frozen=True)
class ComposedTail:
    """A bound on δ at the losses of a window; between two of them it is linear in e^ε.

    Attributes:
        losses: Rising.
        deltas: The bound at each.
        above: Whether it is an upper bound, or a lower one.
    """

    losses: Floats
    deltas: Floats
    above: bool

    def at(self, epsilons: Floats) -> Floats:
        """The bound at each ε."""
        after = np.clip(np.searchsorted(self.losses, epsilons), 1, len(self.losses) - 1)
        left, right = self.losses[after - 1], self.losses[after]
        within = np.clip(epsilons, left, right)
        share = np.exp(within - right) * np.expm1(left - within) / np.expm1(left - right)
        found = self.deltas[after - 1] * (1 - share) + self.deltas[after] * share
        if self.above:
            return np.clip(np.where(epsilons < self.losses[0], 1.0, found), 0.0, 1.0)
        return np.maximum(np.where(epsilons > self.losses[-1], 0.0, found), 0.0)

    def inverse(self, delta: float) -> float:
        """The ε where the bound falls to delta for good, at least 0: itself a bound on ε, ∞ where it does not fall."""
        over = np.flatnonzero(~(self.deltas <= delta) if self.above else self.deltas > delta)
        if len(over) == 0:
            return max(float(self.losses[0]), 0.0) if self.above else 0.0
        last = int(over[-1])
        if last + 1 == len(self.losses):
            return np.inf if self.above else max(float(self.losses[last]), 0.0)
        top, bottom = self.deltas[last], self.deltas[last + 1]
        share, step = (top - delta) / (top - bottom), self.losses[last + 1] - self.losses[last]
        if step > 300:  # Where e^step could overflow, a loss on the safe side will do.
            return max(float(self.losses[last + 1 if self.above else last]), 0.0)
        return max(float(self.losses[last] + np.log1p(share * np.expm1(step))), 0.0)


def compose(parts: Parts, window: Window, epsilon: float, *, above: bool) -> ComposedTail:
    """A bound on δ of the composed loss on the grid within the window, close around epsilon.

    Args:
        parts: Measures that all dominate what they stand for, or all are dominated.
        window: Where the tilted loss lies.
        epsilon: About where on the curve δ is of interest.
        above: Whether they dominate: rounding errors, shifts and infinite masses are added, or subtracted.
    """
    tilts, tilt = window.tilts, window.tilts.middle
    tilted = convolve(parts, tilt, window.low, window.high)
    below, beyond = log_moments(parts, tilt + np.array([-tilts.low, tilts.high])) - tilted.base
    outside = np.exp(min(beyond - tilts.high * window.high, 0.0)) + np.exp(min(below + tilts.low * window.low, 0.0))
    # Only a target guessed far too low needs this; the curve then begins above it.
    epsilon = max(epsilon, (tilted.base - LARGEST) / tilt)
    # And only one guessed far too high this; of the window then its end is kept.
    epsilon = min(epsilon, float(tilted.losses[-1]))
    losses, deltas, errors = _deltas(tilted, tilt, 1.001 * float(tilted.misplaced + outside), epsilon)
    shift = sum(count * measure.shift for measure, count in parts)
    deltas = deltas + errors + infinite_mass(parts) if above else deltas - errors
    return ComposedTail(losses + shift, deltas, above)


def _deltas(tilted: TiltedMass, tilt: float, misplaced: float, epsilon: float) -> tuple[Floats, Floats, Floats]:
    """Losses, δ of the tilted mass at each, and a bound on its error."""
    kept = tilt * (tilted.losses - epsilon) > -LARGEST
    if kept.sum() < 2:  # The grid is so coarse for this tilt that only its end says more than that δ is at most 1.
        end = np.exp(min(tilted.base - tilt * tilted.losses[-1] + log_kernel(tilt), LARGEST)) * misplaced
        return tilted.losses[-2:], np.zeros(2), np.array([1.0, min(float(end), 1.0)])
    losses, mass = tilted.losses[kept], tilted.masses[kept]
    away = tilt * (losses - epsilon)
    mass = mass * np.exp(-away)
    scale = float(np.exp(tilted.base - tilt * epsilon))
    heavy = _above(mass)
    # Σ_{j>i} mass_j e^{loss_i − loss_j}, by a recursion in which nothing over- or underflows.
    decay = float(np.exp(losses[0] - losses[1]))
    light = np.append(recursion([1.0, -decay], decay * mass[:0:-1])[::-1], 0.0)
    errors = np.exp(tilted.base - tilt * epsilon - away + log_kernel(tilt)) * misplaced
    errors += scale * 8 * len(mass) * EPS * _above(np.abs(mass))
    return losses, scale * (heavy - light), errors


def _above(values: Floats) -> Floats:
    """For each place the sum of all later values, smallest first."""
    sums = np.cumsum(values[::-1])[::-1]
    return np.append(sums[1:], 0.0)


def _folded(values: Floats, size: int) -> Floats:
    """Values wrapped around into size places."""
    whole = len(values) // size * size
    folded: Floats = values[:whole].reshape(-1, size).sum(axis=0)
    folded[: len(values) - whole] += values[whole:]
    return folded
