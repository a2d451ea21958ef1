"""The privacy loss of one release as weighted points, derived from what its event means, apart from the accountant.

P is the distribution of the release with the user, Q without, L = log dP/dQ. In the direction "remove" a law is that
of L under P, in the direction "add" that of −L under Q.

Sums of contributions: all of them in one direction are worst (Charles et al. 2024, Theorem 2), so that the pair is one
on the line, here in units of the noise's standard deviation. A cohort of fixed size: Balle, Barthe and Gaboardi 2018,
Theorem 9.
"""

from dataclasses import dataclass
from functools import singledispatch
from typing import Literal, Protocol

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from fedsim.errors import InvalidInput
from fedsim.privacy.events import (
    EVENTS,
    Adjacency,
    BinomialMixtureGaussian,
    Event,
    FixedSizeSubsampledGaussian,
    Gaussian,
    MixtureOfGaussians,
    PoissonSubsampledGaussian,
    TruncatedPoissonSubsampledGaussian,
)

Floats = NDArray[np.float64]
Direction = Literal["remove", "add"]
USUAL = 10.0
"""Standard deviations beyond which an untilted Gaussian is negligible."""


class NotCheckable(InvalidInput):
    """An event whose privacy loss is not known here."""


@dataclass(frozen=True)
class LossPoints:
    """A law of the loss as a quadrature rule: E[f(L)] ≈ Σ exp(log_weights) f(losses), plus atoms, which are exact.

    Attributes:
        losses: L at each point.
        log_weights: Logarithms of the points' probabilities.
        strides: How much the loss changes from a point to its neighbours, as a smooth function of the point; 0 where
            the points must be kept whatever the frequency. A phase tL that turns by π in a stride is not followed.
        atoms: (loss, log probability).
        ahead, behind: Indices of points at the end of large and of small losses: where they carry weight, the rule
            must go on.
    """

    losses: Floats
    log_weights: Floats
    strides: Floats
    atoms: tuple[tuple[float, float], ...]
    ahead: NDArray[np.int_]
    behind: NDArray[np.int_]


class LossLaw(Protocol):
    """What the contour integral needs to know of one release."""

    def points(self, direction: Direction, ahead: float, behind: float, fineness: float) -> LossPoints:
        """The law, as points.

        Args:
            direction: Which of the two laws.
            ahead: How much further than usual to go towards large losses, in x.
            behind: The same towards small losses.
            fineness: How many times as many points as are usually enough.
        """

    def greatest(self, direction: Direction) -> float:
        """The supremum of the loss, in one direction."""

    @property
    def symmetric(self) -> bool:
        """Whether both directions have the same law."""


@singledispatch
def loss_law(event: Event, adjacency: Adjacency) -> LossLaw:
    """The law of an event's loss.

    Raises:
        NotCheckable: For a kind of event, or an adjacency with it, that is not known here.
    """
    raise NotCheckable("event", EVENTS.name_of(type(event)), "of a kind whose privacy loss is known to the check")


@loss_law.register
def _gaussian(event: Gaussian, adjacency: Adjacency) -> LossLaw:
    return _contributions([1.0], [1.0], event.noise_multiplier, adjacency)


@loss_law.register
def _poisson(event: PoissonSubsampledGaussian, adjacency: Adjacency) -> LossLaw:
    q = event.sampling_probability
    return _contributions([0.0, 1.0], [1 - q, q], event.noise_multiplier, adjacency)


@loss_law.register
def _binomial(event: BinomialMixtureGaussian, adjacency: Adjacency) -> LossLaw:
    k = np.arange(event.group_size + 1.0)
    shares = binomial_shares(event.group_size, event.sampling_probability)
    return _contributions(k, shares, event.noise_multiplier, adjacency)


@loss_law.register
def _mixture(event: MixtureOfGaussians, adjacency: Adjacency) -> LossLaw:
    return _contributions(event.sensitivities, event.probabilities, event.noise_multiplier, adjacency)


@loss_law.register
def _fixed_size(event: FixedSizeSubsampledGaussian, adjacency: Adjacency) -> LossLaw:
    share = event.cohort_size / event.population_size
    # Another user takes the place of one who goes, also where users are added or removed: two contributions apart.
    chosen = _contributions([0.0, 2.0], [1 - share, share], event.noise_multiplier, Adjacency.ADD_OR_REMOVE_ONE_USER)
    return MirroredAtZero(chosen) if adjacency is Adjacency.REPLACE_ONE_USER and share < 1 else chosen


@loss_law.register
def _truncated_poisson(event: TruncatedPoissonSubsampledGaussian, adjacency: Adjacency) -> LossLaw:
    q, n, cap, noise = (
        event.sampling_probability,
        event.population_size,
        event.most_units,
        event.noise_multiplier,
    )
    replaced = adjacency is Adjacency.REPLACE_ONE_USER
    full = float(scipy.stats.binom.sf(cap - 1, n - 1, q))  # the others alone reach the cap
    # Where users are added there may be one other more: then all that is known is that the user joins with q.
    also = 0.0 if replaced or cap > n else q * float(scipy.stats.binom.pmf(cap - 1, n - 1, q))
    parts: list[tuple[float, LossLaw]] = [
        (1 - full - also, _contributions([0.0, 1.0], [1 - q, q], noise, adjacency)),
        (also, _contributions([0.0, 2.0], [1 - q, q], noise, adjacency)),
    ]
    if full > 0:
        # Of those who joined, the user among them, as many as the cap are kept: n·(chance of one) in all.
        chance = min(cap / n * float(scipy.stats.binom.sf(cap, n, q)) / full, q)
        taken = _contributions([0.0, 2.0], [1 - chance, chance], noise, Adjacency.ADD_OR_REMOVE_ONE_USER)
        parts.append((full, MirroredAtZero(taken) if replaced else taken))
    return OneOfLaws(tuple((share, law) for share, law in parts if share > 0))


def binomial_shares(trials: int, probability: float) -> Floats:
    """Binomial(trials, probability) at 0 … trials."""
    k = np.arange(trials + 1.0)
    coefficients = (
        scipy.special.gammaln(trials + 1) - scipy.special.gammaln(k + 1) - scipy.special.gammaln(trials - k + 1)
    )
    shares: Floats = np.exp(
        coefficients + scipy.special.xlogy(k, probability) + scipy.special.xlog1py(trials - k, -probability)
    )
    shares /= shares.sum()
    return shares


def _contributions(norms: ArrayLike, shares: ArrayLike, noise: float, adjacency: Adjacency) -> "ShiftedGaussians":
    """A contribution of norm s_k with probability w_k against none, or against its opposite where it is replaced."""
    shifts, weights = np.asarray(norms, dtype=np.float64) / noise, np.asarray(shares, dtype=np.float64)
    order = np.argsort(shifts)[weights[np.argsort(shifts)] > 0]
    return ShiftedGaussians(shifts[order], weights[order] / weights.sum(), adjacency is Adjacency.REPLACE_ONE_USER)


@dataclass(frozen=True)
class ShiftedGaussians:
    """P = Σ w_k N(m_k, 1) against Q = N(0, 1), or against Σ w_k N(−m_k, 1).

    Attributes:
        shifts: m_k ≥ 0, increasing.
        weights: w_k > 0.
        opposed: Whether Q is the mirrored mixture.
    """

    shifts: Floats
    weights: Floats
    opposed: bool

    @property
    def symmetric(self) -> bool:
        """Two opposed mixtures, or two Gaussians."""
        return self.opposed or len(self.shifts) == 1

    def greatest(self, direction: Direction) -> float:
        """Finite where a user who is added may change nothing."""
        absent = float(self.weights[self.shifts == 0].sum())
        bounded = direction == "add" and absent > 0 and not self.opposed
        return -float(np.log(absent)) if bounded else np.inf

    def points(self, direction: Direction, ahead: float, behind: float, fineness: float) -> LossPoints:
        """Trapezoidal rule: exponentially accurate, since all is analytic in a strip about the line."""
        reach = float(self.shifts[-1]) + USUAL
        right, left = (ahead, behind) if direction == "remove" else (behind, ahead)
        low, high = -(reach if self.opposed else USUAL) - left, reach + right
        # The loss has branch points at a height of π over the distance of two shifts.
        strip = np.pi / max(float(np.diff(self.shifts).max(initial=0.0)), 1e-9)
        count = int(np.ceil((high - low) * fineness / min(0.1, strip / 40))) + 1
        x = np.linspace(low, high, count)
        return self.at(x, np.full(count, x[1] - x[0]), np.full(count, x[1] - x[0]), direction)

    def at(self, x: Floats, steps: Floats, pitch: Floats, direction: Direction) -> LossPoints:
        """The law from the points x of a rule, with its weights and its points' distances."""
        above = self._log_ratio(x)
        below = self._log_ratio(-x) if self.opposed else np.zeros_like(x)
        losses, base = above - below, np.log(steps) - x * x / 2 - np.log(2 * np.pi) / 2
        strides = np.abs(np.gradient(losses, x)) * pitch
        first, last = np.array([0]), np.array([-1])
        if direction == "remove":
            return LossPoints(losses, base + above, strides, (), ahead=last, behind=first)
        return LossPoints(-losses, base + below, strides, (), ahead=first, behind=last)

    def _log_ratio(self, x: Floats) -> Floats:
        """log Σ w_k exp(m_k x − m_k²/2), to full relative precision also where it is near 0."""
        less_one, largest, whole = np.zeros_like(x), np.zeros_like(x), np.full_like(x, -np.inf)
        for shift, weight in zip(self.shifts, self.weights, strict=True):
            exponent = shift * x - shift * shift / 2
            largest = np.maximum(largest, exponent)
            less_one += weight * np.expm1(np.minimum(exponent, 30.0))
            whole = np.logaddexp(whole, np.log(weight) + exponent)
        near = (np.abs(less_one) < 0.5) & (largest < 30.0)
        ratio: Floats = np.where(near, np.log1p(np.where(near, less_one, 0.0)), whole)
        return ratio


NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)
WIDEST = 0.12
"""The widest distance of these nodes, over the width of their panel."""


def panels(edges: Floats) -> tuple[Floats, Floats]:
    """Gauss–Legendre points in the panels between edges, and their weights."""
    half, middle = np.diff(edges) / 2, (edges[1:] + edges[:-1]) / 2
    return (middle[:, None] + half[:, None] * NODES).ravel(), (half[:, None] * WEIGHTS).ravel()


@dataclass(frozen=True)
class MirroredAtZero:
    """Losses above 0 as in `chosen`, those below 0 their mirror image, and what is left of the probability at 0.

    A user replaced in a cohort of fixed size: δ(ε) for ε ≥ 0 is that of `chosen`, and it is the same in both
    directions. The law whose δ it is has a jump at 0.
    """

    chosen: ShiftedGaussians

    @property
    def symmetric(self) -> bool:
        """By construction."""
        return True

    def greatest(self, direction: Direction) -> float:
        """There is none."""
        return np.inf

    def points(self, direction: Direction, ahead: float, behind: float, fineness: float) -> LossPoints:
        """Gauss–Legendre panels beyond the point of loss 0, ever narrower towards it."""
        shift = float(self.chosen.shifts[-1])
        middle, width = shift / 2, min(1.0, 2 / shift) / 3  # both densities are equal half-way between the means
        near = np.append(0.0, np.geomspace(width * 2.0**-20, width, int(20 * fineness) + 1))
        far = width + width / fineness * np.arange(1, np.ceil((middle + USUAL + ahead) * fineness / width) + 1)
        beyond, steps = panels(np.append(near, far))
        pitch = 2 * WIDEST / fineness * width * beyond / (beyond + width)
        half = self.chosen.at(middle + beyond, steps, pitch, "remove")
        # Q has the losses' mirror image: e^{−L} times P's probability of L.
        logs = np.append(half.log_weights, half.log_weights - half.losses)
        count = len(beyond)
        return LossPoints(
            np.append(half.losses, -half.losses),
            logs,
            np.append(half.strides, half.strides),
            ((0.0, float(np.log1p(-np.exp(scipy.special.logsumexp(logs))))),),
            ahead=np.array([count - 1]),
            behind=np.empty(0, dtype=int),
        )


@dataclass(frozen=True)
class OneOfLaws:
    """The loss of one of several releases, drawn by a coin that everybody sees.

    Attributes:
        parts: (probability, law).
    """

    parts: tuple[tuple[float, LossLaw], ...]

    @property
    def symmetric(self) -> bool:
        """Where each law is."""
        return all(law.symmetric for _, law in self.parts)

    def greatest(self, direction: Direction) -> float:
        """The greatest of them."""
        return max(law.greatest(direction) for _, law in self.parts)

    def points(self, direction: Direction, ahead: float, behind: float, fineness: float) -> LossPoints:
        """The points of all laws, one after another."""
        found = [(np.log(share), law.points(direction, ahead, behind, fineness)) for share, law in self.parts]
        starts = np.cumsum([0] + [len(points.losses) for _, points in found])
        whole = [(log, points, start) for (log, points), start in zip(found, starts[:-1], strict=True)]
        return LossPoints(
            np.concatenate([points.losses for _, points in found]),
            np.concatenate([log + points.log_weights for log, points in found]),
            np.concatenate([points.strides for _, points in found]),
            tuple((loss, log + weight) for log, points in found for loss, weight in points.atoms),
            ahead=np.concatenate([start + points.ahead % len(points.losses) for _, points, start in whole]),
            behind=np.concatenate([start + points.behind % len(points.losses) for _, points, start in whole]),
        )
