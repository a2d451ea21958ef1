"""The privacy loss of a block of random allocation as weighted points: densities of sums, by quadrature.

In one of t rounds, nobody knows which, the user adds 1 to noise of standard deviation σ. The loss is that of the mean
of t likelihood ratios, L = log (W₁ + … + W_t)/t, with log W_j ~ N(−1/(2σ²), 1/σ²) independent under Q; under P the
density is e^L times Q's. With f and g the densities of log X and log Y, that of log(X + Y) is

    h(z) = ∫ f(z − log(1 + e^{−d})) g(z − log(1 + e^d)) dd,

d = log X − log Y having Jacobian 1. All is analytic about the real line: the trapezoidal rule converges exponentially,
on densities kept as splines of their logarithms.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import scipy

from fedsim.privacy.check.loss_laws import (
    USUAL,
    Direction,
    Floats,
    LossLaw,
    LossPoints,
    NotCheckable,
    ShiftedGaussians,
    loss_law,
)
from fedsim.privacy.events import Adjacency, RandomAllocatedGaussian

LEAST_NOISE = 0.1
"""With less, sums spread so widely that their points take too long."""
POINTS = 400
"""Points of a density."""
SEARCHED = 60
"""Points by which its ends are found."""
NEGLIGIBLE = 50.0
"""What an integrand may have fallen by from its peak, as a logarithm, to need no more accuracy."""
NODES = 160
"""Nodes of an integral over the narrower of two densities."""


@loss_law.register
def _allocated(event: RandomAllocatedGaussian, adjacency: Adjacency) -> LossLaw:
    if adjacency is not Adjacency.ADD_OR_REMOVE_ONE_USER:
        raise NotCheckable("adjacency", adjacency.value, Adjacency.ADD_OR_REMOVE_ONE_USER.value)
    if event.noise_multiplier < LEAST_NOISE:
        raise NotCheckable(
            "noise_multiplier", event.noise_multiplier, f"at least {LEAST_NOISE} with random allocation"
        )
    if event.rounds_per_block == 1:
        return ShiftedGaussians(np.array([1 / event.noise_multiplier]), np.ones(1), opposed=False)
    return HiddenRound(event.rounds_per_block, event.noise_multiplier)


@dataclass(frozen=True)
class LogDensity:
    """The density of the logarithm of a sum of likelihood ratios.

    Attributes:
        terms: How many.
        z: Values of the logarithm, evenly spaced.
        logs: Logarithms of Q's density there.
        spline: Through them.
    """

    terms: int
    z: Floats
    logs: Floats
    spline: Any

    def chords(self, z: Floats) -> Floats:
        """The logarithm of Q's density between points, roughly; −∞ outside them."""
        return np.asarray(np.interp(z, self.z, self.logs, left=-np.inf, right=-np.inf))


@dataclass(frozen=True)
class HiddenRound:
    """The law of L above.

    Attributes:
        rounds: t.
        noise: σ.
    """

    rounds: int
    noise: float

    @property
    def symmetric(self) -> bool:
        """A user who is added has another law."""
        return False

    def greatest(self, direction: Direction) -> float:
        """There is none."""
        return np.inf

    def points(self, direction: Direction, ahead: float, behind: float, fineness: float) -> LossPoints:
        """The points of the density of log (W₁ + … + W_t)."""
        above, below = (ahead, behind) if direction == "remove" else (behind, ahead)
        whole = density(self.rounds, self.noise, USUAL + above, USUAL + below, fineness)
        step = float(whole.z[1] - whole.z[0])
        losses = whole.z - math.log(self.rounds)
        logs, strides = whole.logs + math.log(step), np.full(len(losses), step)
        first, last = np.array([0]), np.array([-1])
        if direction == "remove":
            return LossPoints(losses, logs + losses, strides, (), ahead=last, behind=first)
        return LossPoints(-losses, logs, strides, (), ahead=first, behind=last)


@lru_cache(maxsize=32)
def density(rounds: int, noise: float, above: float, below: float, fineness: float) -> LogDensity:
    """The density of the logarithm of the sum over all rounds, by doubling.

    Args:
        rounds: t.
        noise: σ.
        above, below: How many standard deviations of one term it reaches, under P and under Q.
        fineness: How many times as many points as are usually enough.
    """
    middle = 1 / (2 * noise**2)
    z = np.linspace(-middle - below / noise, middle + above / noise, int(POINTS * fineness))
    logs = -((noise * (z + middle)) ** 2) / 2 + math.log(noise) - math.log(2 * math.pi) / 2
    power = _density(1, z, logs)
    found = power if rounds % 2 else None
    for place in range(1, rounds.bit_length()):
        power = _added(power, power, above, below, fineness)
        if rounds >> place & 1:
            found = power if found is None else _added(power, found, above, below, fineness)
    assert found is not None
    return found


def _density(terms: int, z: Floats, logs: Floats) -> LogDensity:
    return LogDensity(terms, z, logs, scipy.interpolate.make_interp_spline(z, logs, k=5))


def _added(one: LogDensity, other: LogDensity, above: float, below: float, fineness: float) -> LogDensity:
    """The density of the logarithm of the sum of both, where Q or P has some."""
    low, high = (float(np.logaddexp(one.z[end], other.z[end])) for end in (0, -1))
    for _ in range(3):
        z = np.linspace(low, high, SEARCHED)
        low, high = _ends(z, _integrated(one, other, z, 0.5), above, below)
    while True:
        z = np.linspace(low, high, int(POINTS * fineness))
        logs = _integrated(one, other, z, fineness)
        finite = np.flatnonzero(logs > -np.inf)
        if len(finite) == len(z):
            return _density(one.terms + other.terms, z, logs)
        low, high = float(z[finite[0]]), float(z[finite[-1]])


def _ends(z: Floats, logs: Floats, above: float, below: float) -> tuple[float, float]:
    """Where Q's density has fallen by e^{−below²/2} from its peak, and P's by e^{−above²/2}; a point further out."""
    tilted, finite = logs + z, np.flatnonzero(logs > -np.inf)
    low = int(np.flatnonzero(logs >= logs.max() - below**2 / 2)[0])
    high = int(np.flatnonzero(tilted >= tilted.max() - above**2 / 2)[-1])
    return float(z[max(low - 1, finite[0])]), float(z[min(high + 1, finite[-1])])


def _integrated(one: LogDensity, other: LogDensity, z: Floats, fineness: float) -> Floats:
    step = min(one.z[-1] - one.z[0], other.z[-1] - other.z[0]) / (NODES * fineness)
    first, last = float(one.z[0] - other.z[-1]), float(one.z[-1] - other.z[0])
    d = np.linspace(first, last, math.ceil((last - first) / min(step, 0.4 / fineness)) + 1)
    x, y = np.subtract.outer(z, np.logaddexp(0.0, -d)), np.subtract.outer(z, np.logaddexp(0.0, d))
    # Chords, which are quick, tell where a spline's value matters.
    logs = one.chords(x) + other.chords(y)
    with np.errstate(invalid="ignore"):
        matters = logs > logs.max(axis=1, keepdims=True) - NEGLIGIBLE
    logs[matters] = one.spline(x[matters]) + other.spline(y[matters])
    with np.errstate(divide="ignore"):
        return np.asarray(scipy.special.logsumexp(logs, axis=1) + math.log(d[1] - d[0]))
