"""Moment generating functions of sums of losses, on the real line and along a vertical line.

A sum's transform is a product over releases. Where single releases may lose so much that no tilt of the whole sum is
near ε (rare sampling), the sum is cut in two: those where no release loses much more than ε, and the rest.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import scipy
from numpy.typing import NDArray

from fedsim.privacy.check.loss_laws import Floats, LossPoints

Complexes = NDArray[Any]
BLOCK = 128
STRIDE = 16
"""How far the larger steps of a block's table go."""
NOTHING = -60.0
"""Logarithm of a tilted probability that no number of releases makes count."""
Line = Callable[[int], Complexes]
"""From a multiple of the step to a transform at it and the BLOCK − 1 multiples after it, over the value at t = 0."""


class Transform(Protocol):
    """E[e^{sS}; A] of a sum of losses S and some part A of all outcomes."""

    def log_size(self, c: float) -> float:
        """Its logarithm at a real s; −∞ where A is empty."""

    def line(self, c: float, step: float) -> Line:
        """Its values at c + it, over that at c, for multiples t of step."""

    @property
    def effort(self) -> int:
        """Points behind each value."""

    @property
    def returns(self) -> bool:
        """Whether its size may grow again further out on a line, as where atoms make sums almost a lattice."""


@dataclass(frozen=True)
class Part:
    """The law of one release, or a part of it.

    Attributes:
        points: The law.
        count: How often the release occurs.
        lost: Probability that the points lack.
    """

    points: LossPoints
    count: int
    lost: float = 0.0

    def log_size(self, c: float) -> float:
        """log E[e^{cL}], accurate to its last digits also where it is near 0."""
        losses, logs, weights = self._with_atoms
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            exponents = c * losses
            near = np.abs(exponents) < 1
            terms = np.exp(exponents + logs) - weights
            terms[near] = weights[near] * np.expm1(exponents[near])
            less_one = float(terms.sum()) - self.lost
        if -0.5 < less_one < math.inf:
            return math.log1p(less_one)
        return float(scipy.special.logsumexp(exponents + logs))

    @cached_property
    def _with_atoms(self) -> tuple[Floats, Floats, Floats]:
        """All losses, log probabilities and probabilities."""
        losses, logs = self.points.losses, self.points.log_weights
        if self.points.atoms:
            more, more_logs = np.array(self.points.atoms).T
            losses, logs = np.append(losses, more), np.append(logs, more_logs)
        with np.errstate(under="ignore"):
            return losses, logs, np.exp(logs)

    def unfinished(self, c: float) -> tuple[bool, bool]:
        """Whether the law tilted by c goes on ahead of the points, and behind them."""
        logs = self.points.log_weights + c * self.points.losses
        least = logs.max() - 42.0
        return bool((logs[self.points.ahead] > least).any()), bool((logs[self.points.behind] > least).any())

    def line(self, c: float, step: float) -> Line:
        """E[e^{(c+it)L}]/E[e^{cL}] − 1, from products of two tables of e^{itL} − 1."""
        size = self.log_size(c)
        logs = self.points.log_weights + c * self.points.losses - size
        # In the order in which they are faded out: what is left at any frequency are the first of them.
        heavy = np.argsort(self.points.strides, kind="stable")
        heavy = heavy[logs[heavy] > NOTHING]
        losses, strides, weights = self.points.losses[heavy], self.points.strides[heavy], np.exp(logs[heavy])
        atoms = [(loss, math.exp(log + c * loss - size)) for loss, log in self.points.atoms]
        table = _table(losses, step)

        def values(start: int) -> Complexes:
            times = (start + np.arange(BLOCK)) * step
            if start == 0:
                fade = _fade(np.multiply.outer(strides, times))
                less_one = weights @ (table * fade) - weights @ (1 - fade)
            else:
                fade = _fade(times[BLOCK // 2] * strides)
                kept = int(np.count_nonzero(fade))
                faded, outer = weights[:kept] * fade[:kept], _expm1i(times[0] * losses[:kept])
                less_one = faded @ outer + (faded * (1 + outer)) @ table[:kept] - float(weights.sum() - faded.sum())
            for loss, weight in atoms:
                less_one = less_one + weight * _expm1i(times * loss)
            return np.asarray(less_one, dtype=np.complex128)

        return values


@dataclass(frozen=True)
class Sum:
    """All outcomes of independent releases."""

    parts: Sequence[Part]

    def log_size(self, c: float) -> float:
        return sum(part.count * part.log_size(c) for part in self.parts)

    def line(self, c: float, step: float) -> Line:
        lines = [part.line(c, step) for part in self.parts]

        def values(start: int) -> Complexes:
            logs = [part.count * _log1p(line(start)) for part, line in zip(self.parts, lines, strict=True)]
            return _exp(np.sum(logs, axis=0))

        return values

    @property
    def effort(self) -> int:
        return sum(len(part.points.losses) for part in self.parts)

    @property
    def returns(self) -> bool:
        return any(len(part.points.atoms) > 1 for part in self.parts)


@dataclass(frozen=True)
class SomeLarge:
    """The outcomes of independent releases where at least one of them lies in its second part.

    Attributes:
        small: The first parts.
        large: The second parts, in the same order.
    """

    small: Sequence[Part]
    large: Sequence[Part]

    def log_size(self, c: float) -> float:
        more = self._log_growth(c)
        if more == 0:
            return -math.inf
        return Sum(self.small).log_size(c) + (math.log(math.expm1(more)) if more < 30 else more)

    def line(self, c: float, step: float) -> Line:
        lines = [
            (one.count, math.exp(ratio), one.line(c, step), other.line(c, step) if math.isfinite(ratio) else None)
            for one, other, ratio in zip(self.small, self.large, self._log_ratios(c), strict=True)
        ]
        whole = math.expm1(self._log_growth(c))

        def values(start: int) -> Complexes:
            below, growth = np.zeros(BLOCK, complex), np.zeros(BLOCK, complex)
            for count, ratio, small, large in lines:
                one = small(start)
                below += count * _log1p(one)
                if large is not None:
                    growth += count * _log1p(ratio * (1 + large(start)) / (1 + one))
            return _exp(below) * np.expm1(growth) / whole

        return values

    @property
    def effort(self) -> int:
        return 2 * Sum(self.small).effort

    @property
    def returns(self) -> bool:
        return Sum(self.small).returns

    def _log_growth(self, c: float) -> float:
        """log of the whole sum's transform over that of the small parts."""
        logs = zip(self.small, self._log_ratios(c), strict=True)
        return float(sum(part.count * np.logaddexp(0.0, ratio) for part, ratio in logs))

    def _log_ratios(self, c: float) -> list[float]:
        sizes = [
            float(scipy.special.logsumexp(c * part.points.losses + part.points.log_weights)) for part in self.large
        ]
        return [size - part.log_size(c) for size, part in zip(sizes, self.small, strict=True)]


def cut(parts: Sequence[Part], loss: float) -> tuple[Sum, SomeLarge]:
    """The outcomes where no release loses much more than so much, and the others; the cut is smooth in x."""
    small, large = [], []
    for part in parts:
        points = part.points
        with np.errstate(divide="ignore", invalid="ignore", under="ignore", over="ignore"):
            place = (points.losses - loss) / points.strides / 4 - 3
            place = np.where(points.strides > 0, place, -np.inf)
            keep, drop = np.log(scipy.special.erfc(place) / 2), np.log(scipy.special.erfc(-place) / 2)
        kept = replace(points, log_weights=points.log_weights + keep)
        dropped = replace(points, log_weights=points.log_weights + drop, atoms=())
        mass = float(np.exp(scipy.special.logsumexp(dropped.log_weights)))
        small.append(Part(kept, part.count, lost=mass))
        large.append(Part(dropped, part.count, lost=1 - mass))
    return Sum(small), SomeLarge(small, large)


@dataclass(frozen=True)
class LoneAtoms:
    """The outcomes where every release's loss is one of its atoms: a sum, not an integral.

    Attributes:
        parts: The releases.
        losses, logs: The sums of atoms, and their log probabilities.
    """

    parts: Sequence[Part]
    losses: Floats
    logs: Floats

    def values(self, c: float, t: NDArray[Any], size: float) -> Complexes:
        """Their share of a transform at c + it over e^size."""
        total = np.full(t.shape, -size, dtype=np.complex128)
        for part in self.parts:
            losses, logs = np.array(part.points.atoms).T
            tilted = logs + c * losses
            turned = np.exp(1j * np.multiply.outer(t, losses)) @ np.exp(tilted - tilted.max())
            total += part.count * (_log1p(turned - 1) + tilted.max())
        return _exp(total)

    def delta(self, epsilon: float) -> float:
        """Their share of δ(ε)."""
        beyond = self.losses > epsilon
        with np.errstate(under="ignore"):
            return float(np.sum(np.exp(self.logs[beyond]) * -np.expm1(epsilon - self.losses[beyond])))


def lone_atoms(parts: Sequence[Part]) -> LoneAtoms | None:
    """None where a release has no atoms, or more than two, or the sums are too many."""
    losses, logs = np.zeros(1), np.zeros(1)
    for part in parts:
        atoms, n = part.points.atoms, part.count
        if not 1 <= len(atoms) <= 2 or len(losses) * (n if len(atoms) > 1 else 1) > 100_000:
            return None
        if len(atoms) == 1:
            more, more_logs = np.array([n * atoms[0][0]]), np.array([n * atoms[0][1]])
        else:
            k = np.arange(n + 1.0)
            (one, log), (other, other_log) = atoms
            more = one * (n - k) + other * k
            more_logs = (
                scipy.special.gammaln(n + 1)
                - scipy.special.gammaln(k + 1)
                - scipy.special.gammaln(n - k + 1)
                + (n - k) * log
                + k * other_log
            )
        losses, logs = np.add.outer(losses, more).ravel(), np.add.outer(logs, more_logs).ravel()
    return LoneAtoms(parts, losses, logs)


def _fade(turn: NDArray[Any]) -> Floats:
    """1 where a phase turns little from point to point, 0 before it turns by 2π.

    Where the phase turns faster than the points follow, the law is smooth and adds nothing: it is faded out before its
    points would seem to stand still and add something.
    """
    with np.errstate(divide="ignore", under="ignore"):
        fade: Floats = scipy.special.erfc((np.log(turn / math.pi) - math.log(0.55)) / 0.25) / 2
    return np.where(fade > 1e-17, fade, 0.0)


def _expm1i(angle: NDArray[Any]) -> Complexes:
    """e^{i·angle} − 1."""
    result = np.empty(angle.shape, dtype=np.complex128)
    result.real = -2 * np.sin(angle / 2) ** 2
    result.imag = np.sin(angle)
    return result


def _table(losses: Floats, step: float) -> Complexes:
    """e^{itL} − 1 at the first BLOCK multiples of step, a row for each loss: products of two small tables."""
    near = _expm1i(np.multiply.outer(losses, np.arange(STRIDE) * step))[:, None, :]
    far = _expm1i(np.multiply.outer(losses, np.arange(0, BLOCK, STRIDE) * step))[:, :, None]
    both = near * far
    both += near
    both += far
    return both.reshape(len(losses), BLOCK)


def _log1p(z: Complexes) -> Complexes:
    """log(1 + z), to its last digits also where z is small; −∞ is as small as a float can tell."""
    x, y = z.real, z.imag
    excess = 2 * x + x * x + y * y
    near = excess > -0.5
    size = np.log(np.maximum(np.abs(1 + z), 1e-300))
    return np.asarray(np.where(near, np.log1p(np.where(near, excess, 0.0)) / 2, size) + 1j * np.arctan2(y, 1 + x))


def _exp(z: Complexes) -> Complexes:
    with np.errstate(under="ignore"):
        return np.asarray(np.exp(z))
