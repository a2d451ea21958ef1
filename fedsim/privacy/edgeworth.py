"""The Edgeworth accountant (EW-Tune): estimates of ε and δ from cumulants. A diagnostic, never a guarantee.

With Y the privacy loss of a whole run under one data set and X the same log-likelihood ratio under its neighbour,

    δ(ε) = Pr[Y > ε] − e^ε Pr[X > ε].

Both are sums over the steps. Their cumulants add, and the Edgeworth series of order 0 (normal) to 3 turns cumulants
into approximate tails (Wang et al. 2022, "Analytical composition of differential privacy via the Edgeworth
accountant"; Behnia et al. 2022, EW-Tune). The error is of unknown sign, and e^ε multiplies it: at EW-Tune's own
setting (q = 2000/392702, σ = 0.573, T = 3920, δ = 1e-6) order 1 reports ε ≈ 7.99 where the exact value lies within
[9.56, 9.60]. Everything here is therefore an Estimate, which certifies and calibrates nothing.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import scipy
from numpy.polynomial.hermite_e import hermeval
from numpy.polynomial.polynomial import polyval
from numpy.typing import NDArray

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import flatten
from fedsim.privacy.bounds import Estimate
from fedsim.privacy.dominating_pairs import dominating_pair
from fedsim.privacy.events import Adjacency, Event
from fedsim.privacy.gaussian_pairs import GaussianPair
from fedsim.validation import require_at_least, require_between

Direction = Literal["remove", "add", "both"]
Floats = NDArray[np.float64]
ORDERS = (0, 1, 2, 3)
REACH = 14.0
"""Standard deviations of a component's tail that the quadrature covers."""
NODES = 1 << 14
FREQUENCIES = 200
LARGEST = 600.0
"""No ε above this is looked for."""


def epsilon_estimate(event: Event, delta: float, *, order: int = 1, direction: Direction = "both") -> Estimate:
    """The Edgeworth estimate of ε at delta under add-or-remove-one-user.

    Args:
        event: Gaussian, Poisson-subsampled, Binomial-mixture or mixture-of-Gaussians releases, composed at will.
        delta: 0 < δ < 1.
        order: 0 (normal approximation) to 3.
        direction: Removing a user, adding one, or the larger of both.

    Returns:
        The largest ε at which the estimated δ(ε) crosses delta (0 when it stays below). May be above or below the
        true value.

    Raises:
        InvalidInput: For an order outside 0 … 3, a δ outside (0, 1), or an event without a known pair.
    """
    return _estimate(event, delta, order, direction, finite_sample=False)


def finite_sample_epsilon(event: Event, delta: float, *, order: int = 1, direction: Direction = "both") -> Estimate:
    """The ε at which the Edgeworth estimate plus its finite-sample error bound reaches delta.

    Solves δ_EW(ε) + Δ_Y + e^ε Δ_X = δ, with Δ the bound on the distance between the true distribution function and
    its Edgeworth series from Esseen's smoothing inequality (Feller, vol. II, XVI.3, Lemma 2),

        Δ = min_T (1/π) ∫_{−T}^{T} |φ(t) − γ(t)| / |t| dt + 24 max|G'| / (πT),

    φ and γ the characteristic functions of the standardised sum and of the series G. It is finite only when Δ_Y and
    Δ_X are far below δ, hence hardly ever at the δ of practice. The integrals come from plain quadrature without
    certified rounding: the value is an Estimate like the others.

    Returns:
        The estimate; inf where the error bound leaves no finite ε.

    Raises:
        InvalidInput: As epsilon_estimate.
    """
    return _estimate(event, delta, order, direction, finite_sample=True)


def delta_estimate(event: Event, epsilon: float, *, order: int = 1, direction: Direction = "both") -> Estimate:
    """The Edgeworth estimate of δ at epsilon, which may lie outside [0, 1]; see epsilon_estimate.

    Raises:
        InvalidInput: For an order outside 0 … 3, a negative ε, or an event without a known pair.
    """
    require_at_least("epsilon", epsilon, 0)
    value = max((float(pair.delta(np.array(epsilon), order)) for pair in _pairs(event, order, direction)), default=0.0)
    return Estimate(value=value, method=f"Edgeworth, order {order}, {direction}")


def _estimate(event: Event, delta: float, order: int, direction: Direction, *, finite_sample: bool) -> Estimate:
    require_between("delta", delta, 0, 1)
    pairs = _pairs(event, order, direction)
    value = max((pair.epsilon(delta, order, finite_sample=finite_sample) for pair in pairs), default=0.0)
    what = "Edgeworth with finite-sample bound" if finite_sample else "Edgeworth"
    return Estimate(value=value, method=f"{what}, order {order}, {direction}")


@dataclass(frozen=True)
class _LossSum:
    """A sum of independent losses: values and masses at nodes for each kind, and how many of it there are."""

    parts: tuple[tuple[Floats, Floats, int], ...]

    @cached_property
    def cumulants(self) -> Floats:
        """The first five."""
        total = np.zeros(5)
        for losses, masses, count in self.parts:
            mean = masses @ losses
            second, third, fourth, fifth = (masses @ (losses - mean) ** power for power in (2, 3, 4, 5))
            total += count * np.array([mean, second, third, fourth - 3 * second**2, fifth - 10 * second * third])
        return total

    @property
    def mean(self) -> float:
        return float(self.cumulants[0])

    @property
    def std(self) -> float:
        return math.sqrt(self.cumulants[1])

    def series(self, order: int) -> Floats:
        """Coefficients c of the density φ(z) Σ c_k He_k(z) of the standardised sum."""
        third, fourth, fifth = self.cumulants[2:] / self.std ** np.arange(3, 6)
        terms: tuple[dict[int, float], ...] = (
            {0: 1.0},
            {3: third / 6},
            {4: fourth / 24, 6: third**2 / 72},
            {5: fifth / 120, 7: third * fourth / 144, 9: third**3 / 1296},
        )
        coefficients = np.zeros(10)
        for term in terms[: order + 1]:
            coefficients[list(term)] += list(term.values())
        return coefficients

    def above(self, epsilon: Floats, order: int, sign: int) -> Floats:
        """Approximate probability that sign · sum is above each epsilon (∫_z^∞ φ He_k = φ(z) He_{k−1}(z))."""
        z = (epsilon - sign * self.mean) / self.std
        coefficients = self.series(order) * float(sign) ** np.arange(10)
        probability: Floats = scipy.stats.norm.sf(z) + scipy.stats.norm.pdf(z) * hermeval(z, coefficients[1:])
        return probability

    def distance(self, order: int) -> float:
        """Esseen's bound on the distance between the distribution function and its series; 0 for a normal sum."""
        if all(_is_affine(losses) for losses, _, _ in self.parts):
            return 0.0
        coefficients = self.series(order)
        z = np.linspace(-12, 12, 4801)
        steepest = float(np.abs(scipy.stats.norm.pdf(z) * hermeval(z, coefficients)).max())
        t, characteristic = self._spectrum
        gap = np.abs(characteristic - np.exp(-(t**2) / 2) * polyval(1j * t, coefficients))
        # The gap grows at least like t³ from 0, so that its integral over dt/t up to t₀ is below gap(t₀).
        area = gap[0] + np.concatenate([[0.0], np.cumsum((gap[1:] + gap[:-1]) / 2 * np.diff(np.log(t)))])
        return float((2 / math.pi * area + 24 * steepest / (math.pi * t)).min())

    @cached_property
    def _spectrum(self) -> tuple[Floats, NDArray[np.complex128]]:
        """Frequencies, and the standardised sum's characteristic function at them."""
        # Above the last one neighbouring nodes are too far apart in phase for a sum over nodes to be an integral.
        fastest = max(np.abs(np.diff(losses)).max() for losses, _, _ in self.parts)
        t = np.geomspace(1e-2, max(self.std / fastest, 1.0), FREQUENCIES)
        total = np.ones(len(t), dtype=complex)
        for losses, masses, count in self.parts:
            centred = (losses - masses @ losses) / self.std
            for place in range(0, len(t), 25):
                part = slice(place, place + 25)
                total[part] *= (np.exp(1j * np.outer(t[part], centred)) @ masses) ** count
        return t, total


@dataclass(frozen=True)
class _Pair:
    """The loss with the user present and with the user absent, seen from one side."""

    own: _LossSum
    neighbour: _LossSum
    sign: int

    def delta(self, epsilon: Floats, order: int) -> Floats:
        own, neighbour = self.own.above(epsilon, order, self.sign), self.neighbour.above(epsilon, order, self.sign)
        return own - np.exp(epsilon) * neighbour

    def epsilon(self, delta: float, order: int, *, finite_sample: bool) -> float:
        """The last crossing of delta from above; with finite_sample the first ε at which delta is met, or inf."""
        own = self.own.distance(order) if finite_sample else 0.0
        neighbour = self.neighbour.distance(order) if finite_sample else 0.0

        def excess(epsilon: Floats) -> Floats:
            return self.delta(epsilon, order) + own + np.exp(epsilon) * neighbour - delta

        farthest = min(max(self.sign * self.own.mean, 0) + 40 * self.own.std, LARGEST)
        grid = np.linspace(0, farthest, 8193)
        above = excess(grid) > 0
        crossings = np.flatnonzero(above[:-1] & ~above[1:])
        if not len(crossings):
            return math.inf if above.all() else 0.0
        place = crossings[0 if finite_sample else -1]
        return float(
            scipy.optimize.brentq(lambda epsilon: float(excess(np.array(epsilon))), grid[place], grid[place + 1])
        )


def _pairs(event: Event, order: int, direction: Direction) -> list[_Pair]:
    """The pairs of the directions asked for; none when nothing is released."""
    if order not in ORDERS:
        raise InvalidInput("order", order, "0, 1, 2 or 3")
    if direction not in ("remove", "add", "both"):
        raise InvalidInput("direction", direction, "remove, add or both")
    present, absent = _loss_sums(event)
    if not present.parts:
        return []
    pairs = {"remove": _Pair(present, absent, 1), "add": _Pair(absent, present, -1)}
    return list(pairs.values()) if direction == "both" else [pairs[direction]]


@lru_cache(maxsize=4)
def _loss_sums(event: Event) -> tuple[_LossSum, _LossSum]:
    """The loss with the user present and with the user absent; kept, because orders and directions share it."""
    counts = {single: count for single, count in flatten(event).items() if count}
    parts = [(*_losses(single), count) for single, count in counts.items()]
    present = tuple((losses, masses, count) for losses, masses, _, count in parts)
    absent = tuple((losses, masses, count) for losses, _, masses, count in parts)
    return _LossSum(present), _LossSum(absent)


def _losses(event: Event) -> tuple[Floats, Floats, Floats]:
    """Losses at nodes, and the nodes' masses with the user present and absent."""
    pair = dominating_pair(event, Adjacency.ADD_OR_REMOVE_ONE_USER)
    if not isinstance(pair, GaussianPair) or pair.below.means.any():
        raise InvalidInput(
            "event", event, "a mixture of Gaussians against one Gaussian", "Sample by Poisson sampling."
        )
    nodes = np.linspace(-REACH, pair.above.means.max() + REACH, NODES)
    losses, _ = pair.loss(nodes)
    log_masses = scipy.stats.norm.logpdf(nodes) + math.log(nodes[1] - nodes[0])
    return losses, np.exp(log_masses + losses), np.exp(log_masses)


def _is_affine(losses: Floats) -> bool:
    """Whether losses grow evenly with the node, so that their distribution is exactly normal."""
    steps = np.diff(losses)
    return bool(np.ptp(steps) <= 1e-9 * np.abs(steps).max())
