"""δ(ε) of composed releases by a contour integral through a saddle point: a method apart from the accountant's.

With M the transform of the sum of losses, E[e^{sL}],

    δ(ε) = E[(1 − e^{ε−L})₊] = 1/(2πi) ∫ M(s) e^{−sε} / (s(s + 1)) ds   along Re s = c, for any c > 0 with finite M(c).

At the c where the integrand is least on the real line hardly anything cancels: the value keeps its relative accuracy
down to δ = 1e-18 and below. The trapezoidal rule on the line is the sum of the tilted law wrapped around at a period,
which Chernoff's bound chooses so long that no tail reaches over. Where M decays slowly (few releases, rare sampling) a
smooth window ends the line: what it smooths is δ about ε, where δ is smooth itself.

Nothing here is certified. The error is what doubling all resolutions changes, rounding, and the last pieces of the
line.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from fedsim.privacy.check.characteristic import BLOCK, LoneAtoms, Part, Sum, Transform, cut, lone_atoms
from fedsim.privacy.check.loss_laws import Direction, Floats, LossLaw

GONE = 42.0
"""−log of what is too small to count, relative to the whole."""
AGREED = 1e-7
"""Relative difference of two resolutions at which the finer one is believed."""
RESOLUTIONS = (1.0, 2.0, 4.0, 8.0, 16.0)
MOST_POINTS = 1_000_000
MOST_WORK = 3e8
"""Points in x times points on the line, after which a line ends."""
ALL_WORK = 2e9
"""The same, after which no finer resolution is tried."""
OVERHEAD = 500
"""What a point on the line costs besides, in points in x."""
MOST_CANCELLED = 1e4
"""How far the integrand may exceed the integral before the outcomes are divided."""

Laws = Sequence[tuple[LossLaw, int]]


@dataclass(frozen=True)
class CheckedDelta:
    """δ, and how far it may be off: from a numerical check, not certified.

    Attributes:
        value: δ.
        error: Largest error to be expected, absolute.
    """

    value: float
    error: float


def delta_at(laws: Laws, epsilon: float, direction: Direction) -> CheckedDelta:
    """δ at ε of independent releases, in one direction.

    Args:
        laws: Each law, and how often it occurs.
        epsilon: ε ≥ 0.
        direction: "remove" (P against Q) or "add" (Q against P).
    """
    if epsilon >= sum(count * law.greatest(direction) for law, count in laws):
        return CheckedDelta(0.0, 0.0)
    found, spent = CheckedDelta(0.0, math.inf), 0.0
    for fineness in RESOLUTIONS:
        parts = _parts(laws, epsilon, direction, fineness)
        if parts is None:
            break
        finer, work = _at_resolution(parts, epsilon, fineness)
        spent += work
        change = abs(finer.value - found.value)
        found = CheckedDelta(finer.value, 4 * change + finer.error if fineness > 1 else math.inf)
        if found.error <= AGREED * found.value or (fineness > 1 and spent > ALL_WORK):
            break
    return found


def _at_resolution(parts: Sequence[Part], epsilon: float, fineness: float) -> tuple[CheckedDelta, float]:
    """δ, with the error that one resolution knows of, and the work behind it."""
    lone = lone_atoms(parts)
    certain = 0.0 if lone is None else lone.delta(epsilon)
    whole = _integral(Sum(parts), lone, epsilon, fineness)
    pieces = [whole]
    if whole.gross > MOST_CANCELLED * abs(whole.value + certain):
        small, large = cut(parts, epsilon)
        pieces = [_integral(small, lone, epsilon, fineness)]
        if math.isfinite(large.log_size(0.0)):
            pieces.append(_integral(large, None, epsilon, fineness))
    total = certain + sum(piece.value for piece in pieces)
    found = CheckedDelta(total, sum(piece.error for piece in pieces))
    return found, whole.work + sum(piece.work for piece in pieces)


def _parts(laws: Laws, epsilon: float, direction: Direction, fineness: float) -> list[Part] | None:
    """Points for every law, that reach as far as the law does once it is tilted to ε; None if too many."""
    beyond = [[0.0, 0.0] for _ in laws]
    while True:
        parts = [
            Part(law.points(direction, ahead, behind, fineness), count)
            for (law, count), (ahead, behind) in zip(laws, beyond, strict=True)
        ]
        if Sum(parts).effort > MOST_POINTS:
            return None
        c, done = _saddle_point(Sum(parts), epsilon), True
        for part, reach in zip(parts, beyond, strict=True):
            for side, unfinished in enumerate(part.unfinished(c)):
                if unfinished:
                    reach[side] = 1.5 * reach[side] + 10
                    done = False
        if done:
            return parts


def _log_integrand(transform: Transform, epsilon: float, c: float) -> float:
    return transform.log_size(c) - c * epsilon - math.log(c) - math.log1p(c)


def _saddle_point(transform: Transform, epsilon: float) -> float:
    """The c > 0 where the integrand, a convex function on the real line, is least."""
    found = scipy.optimize.minimize_scalar(
        lambda log_c: _log_integrand(transform, epsilon, math.exp(log_c)),
        bounds=(-25.0, 25.0),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return math.exp(float(found.x))


@dataclass(frozen=True)
class Integral:
    """An integral along the line.

    Attributes:
        value: Its value.
        error: From rounding and from where the line ends.
        gross: The integral of the integrand's size: what cancels, if it is much more than value.
        work: Points in x times points on the line.
    """

    value: float
    error: float
    gross: float
    work: float


def _integral(transform: Transform, lone: LoneAtoms | None, epsilon: float, fineness: float) -> Integral:
    """The contour integral, less the share of outcomes that are summed apart.

    The line is taken in octaves, each cut out by a smooth window: what still oscillates far out comes from ever
    smaller parts of the law and needs ever fewer points, which half of an octave's points tell.
    """
    c = _saddle_point(transform, epsilon)
    size = _log_integrand(transform, epsilon, c)
    shortest = 2 * math.pi / (_period(transform, c, epsilon) * (1 + fineness) / 2)
    step, begin, end = shortest, 0.0, 8 * BLOCK * shortest
    work, last, total, gross = 0.0, math.inf, 0.0, 0.0
    while True:
        first = int(FADED * begin / step)
        values, ended = _integrand(transform, lone, epsilon, c, step, first, math.ceil(end / step))
        work += len(values) * (transform.effort + OVERHEAD)
        t = (first + np.arange(len(values))) * step
        if not ended:
            values = values * _window(t / end)
        if begin:
            values = values * (1 - _window(t / begin))
        else:
            values[0] /= 2
        piece = step / math.pi * float(values.sum())
        doubt = abs(2 * step / math.pi * float(values[::2].sum()) - piece)
        if step > shortest and doubt > AGREED / 100 * abs(total):
            step /= 2
            continue
        total += piece
        gross += step / math.pi * float(np.abs(values).sum())
        missing = 0.0 if ended else abs(piece) + abs(last)
        if missing <= AGREED / 10 * abs(total) or work > MOST_WORK:
            break
        if doubt <= AGREED / 1000 * abs(total):
            step *= 2
        begin, end, last = end, 2 * end, piece
    scale = math.exp(size) if size > -700 else 0.0
    rounding = 1e-15 * (10 + abs(size) + c * epsilon) * gross
    return Integral(scale * total, scale * (min(missing, gross) + rounding), scale * gross, work)


def _integrand(
    transform: Transform, lone: LoneAtoms | None, epsilon: float, c: float, step: float, first: int, stop: int
) -> tuple[Floats, bool]:
    """The integrand's real part over its value at c, at multiples of step, and whether it has come to nothing."""
    line, size, blocks = transform.line(c, step), transform.log_size(c), []
    for start in range(first, stop, BLOCK):
        t = (start + np.arange(BLOCK)) * step
        s = c + 1j * t
        values = line(start)
        if lone is not None:
            values = values - lone.values(c, t, size)
        values = values * (c * (c + 1)) / (s * (s + 1))
        blocks.append((values * np.exp(-1j * epsilon * t)).real)
        if np.abs(values).max() < 1e-17 and not transform.returns:
            return np.concatenate(blocks), True
    return np.concatenate(blocks), False


FADED = 0.35


def _window(place: NDArray[Any]) -> Floats:
    """1 up to FADED, 0 from 1 on, smooth in between."""
    window: Floats = scipy.special.erfc((place - 0.7) / 0.06) / 2
    return window


def _period(transform: Transform, c: float, epsilon: float) -> float:
    """A distance from ε, on both sides, beyond which the law tilted by c holds nothing worth counting."""
    size = transform.log_size(c)
    shifts = c * np.geomspace(1e-4, 10.0, 60)
    ahead = min((transform.log_size(c + shift) - size + GONE) / shift - epsilon for shift in shifts)
    behind = min((transform.log_size(c - shift) - size + GONE) / shift + epsilon for shift in shifts)
    return float(max(ahead, behind, GONE / c))
