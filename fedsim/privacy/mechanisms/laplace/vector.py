"""Randomised-scale Laplace noise on a sum clipped in L1: its sampler and its exact privacy-loss distribution.

One inverse scale S is drawn for the whole release, and every coordinate gets independent Laplace noise of scale 1/S.
What is charged is the release that also reveals S: an upper bound whatever an observer learns of S, and nearly
attained in high dimension.

Why L1. Fix S = s and a false-positive rate, and let β(t) be the best true-positive rate when a user moves the sum by
L1 norm t. Per unit of t, β gains at most s·min(β, 1 − β), since the density changes by at most a factor e^s and
integrates to 1; for one number moved by t, tested by half-lines, that is an equality. So no shift of L1 norm k beats
one number moved by k; and since half-lines are the best tests for every k at once, the same holds for a random k, as
sampling makes it. The pair Σ_k Binom(G, p)(k) Lap(k, 1/s) against Lap(0, 1/s), with s revealed, therefore dominates.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy

from fedsim.errors import InvalidInput
from fedsim.privacy.dominating_pairs import LossPair, register
from fedsim.privacy.events import Adjacency
from fedsim.privacy.loss_cells import Floats, LossCells
from fedsim.privacy.mechanisms.laplace.event import RandomisedScaleLaplace
from fedsim.privacy.mechanisms.laplace.inverse_scale import FAMILIES, Law, log_tail, sample_inverse_scales, support

CELLS = 24
"""Inverse scales to which a law is rounded where a user may contribute several times (no closed form there)."""
OUTSIDE = 1e-6
"""Probability of inverse scales beyond the last of them; they are rounded down to it, which is more noise."""
ROUNDING = 16 * np.finfo(float).eps


def sample_release_noise(event: RandomisedScaleLaplace, size: int, generator: np.random.Generator) -> np.ndarray:
    """The noise of one release, float64 [size], for contributions clipped to L1 norm 1."""
    drawn = sample_inverse_scales(event.law, 1, generator)
    if event.group_size > 1:
        scales = rounded_law(event.law)[0]
        drawn = scales[np.minimum(np.searchsorted(scales, drawn), len(scales) - 1)]
    noise: np.ndarray = generator.laplace(size=size) / drawn
    return noise


def laplace_curve(event: RandomisedScaleLaplace, epsilons: Floats | float, *, remove: bool) -> Floats:
    """Exact δ(ε) of one release, up to rounding, float64 of epsilons' shape; ε may be negative.

    Args:
        event: The release.
        epsilons: ε.
        remove: The mixture against the null (True), or the null against the mixture.
    """
    epsilons = np.asarray(epsilons, dtype=np.float64)
    pair = LaplacePair(event)
    if remove:
        p, q = pair.tails(epsilons)
        return np.maximum(0.0, p - np.exp(epsilons) * q)
    p, q = pair.tails(-epsilons, below=True)
    return np.maximum(0.0, q - np.exp(epsilons) * p)


@lru_cache(maxsize=64)
def rounded_law(law: Law) -> tuple[Floats, Floats]:
    """At most CELLS inverse scales, increasing, and their probabilities: the law rounded up to them."""
    low, high = support(law, OUTSIDE)
    if low == high:
        return np.array([low]), np.ones(1)
    scales = np.linspace(low, high, CELLS + 1)[1:]
    tails = sum(weight * FAMILIES[name].distribution(a, b).sf(scales) for name, weight, a, b in law)
    masses = -np.diff(np.append(tails, 0.0), prepend=1.0)[:-1]
    masses[-1] += tails[-1]
    return scales[masses > 0], masses[masses > 0]


@dataclass(frozen=True)
class LaplacePair:
    """The pair of a release: P has the user, Q does not, and both reveal S."""

    event: RandomisedScaleLaplace

    @property
    def symmetric(self) -> bool:
        """Whether both directions have the same privacy curve: without sampling, and with one contribution."""
        return self.event.sampling_probability == 1 and self.event.group_size == 1

    @property
    def least_loss(self) -> float:
        """A lower limit of the loss: what is left if none of the user's contributions took part."""
        absent = (1 - self.event.sampling_probability) ** self.event.group_size
        return float(np.log(absent)) if absent > 0 else -np.inf

    def loss_range(self, tail: float) -> tuple[float, float]:
        """Losses (low, high) with Q(loss < low) ≤ tail and P(loss > high) ≤ tail."""
        reach = np.geomspace(1e-9, 1e9, 1200)
        above, below = self.tails(reach)[0], self.tails(-reach, below=True)[1]
        found = [reach[np.argmax(np.append(side[:-1] <= tail, True))] for side in (below, above)]
        return -float(found[0]), float(found[1])

    def cells(self, edges: Floats) -> LossCells:
        """Probabilities of the cells between losses, taken from the nearer tail."""
        above, below = self.tails(edges), self.tails(edges, below=True)
        # Exponents reach so far, and so do the roundings of what is taken of them.
        reach = self.event.group_size * support(self.event.law, OUTSIDE)[1] if self.event.group_size > 1 else 0.0
        doubt = ROUNDING * (1 + reach) * self.event.group_size
        measured = []
        for high, low in zip(above, below, strict=True):
            # Each cell from the tail on its own side of the edge where the tails are equal.
            upper = np.append(np.insert(-np.diff(high), 0, 1 - high[0]), high[-1])
            lower = np.append(np.insert(np.diff(low), 0, low[0]), 1 - low[-1])
            near = np.insert(low <= high, 0, True)
            mass = np.maximum(np.where(near, lower, upper), 0.0)
            size = np.minimum(high, low)
            measured.append((mass, doubt * (np.append(size, 0.0) + np.insert(size, 0, 0.0))))
        (p, p_error), (q, q_error) = measured
        rounding = float(doubt + ROUNDING * np.abs(edges).max())
        return LossCells(edges=edges, p=p, q=q, p_error=p_error, q_error=q_error, loss_error=rounding)

    def tails(self, losses: Floats, *, below: bool = False) -> tuple[Floats, Floats]:
        """Pr[loss > l] (or, below, Pr[loss ≤ l]) under P and under Q, float64 of losses' shape."""
        event = self.event
        if event.group_size == 1:
            return _one_contribution(event.law, event.sampling_probability, losses, below)
        shares = scipy.stats.binom.pmf(np.arange(event.group_size + 1), event.group_size, event.sampling_probability)
        totals = np.zeros((2, *losses.shape))
        for scale, mass in zip(*rounded_law(event.law), strict=True):
            totals += mass * np.stack(_fixed_scale(scale, shares, losses, below))
        return totals[0], totals[1]


@register
def _laplace_pair(event: RandomisedScaleLaplace, adjacency: Adjacency) -> LossPair:
    if adjacency is Adjacency.REPLACE_ONE_USER:
        raise InvalidInput("adjacency", adjacency.value, Adjacency.ADD_OR_REMOVE_ONE_USER.value)
    return LaplacePair(event)


def _one_contribution(law: Law, q: float, losses: Floats, below: bool) -> tuple[Floats, Floats]:
    """G = 1: the loss is log(1 − q + q e^{l′}), l′ the loss without sampling."""
    with np.errstate(divide="ignore", invalid="ignore"):
        low = 1 + np.expm1(np.minimum(losses, 0.0)) / q
        least = low <= 0
        # Above 0 the same in another form, which does not overflow.
        high = losses - np.log(q) + np.log1p(-(1 - q) * np.exp(-np.maximum(losses, 0.0)))
        inner = np.where(losses > 0, high, np.log(np.where(least, 1.0, low)))
    size = np.abs(inner)
    log_halved = log_tail(law, -0.5, size) - np.log(2)
    # With h = E[e^{−S/2}; S > l′]/2, for l′ ≥ 0: Q(loss > l′) = e^{−l′/2} h, P(loss > l′) = Pr[S > l′] − e^{l′/2} h;
    # below −l′ the two exchange, by symmetry.
    thin = np.exp(log_halved - size / 2)
    thick = np.maximum(np.exp(log_tail(law, 0.0, size)) - np.exp(log_halved + size / 2), 0.0)
    positive = inner >= 0
    p_above, q_above = np.where(positive, thick, 1 - thin), np.where(positive, thin, 1 - thick)
    p_below, q_below = np.where(positive, 1 - thick, thin), np.where(positive, 1 - thin, thick)
    p, q_mass = (p_below, q_below) if below else (p_above, q_above)
    outside = 0.0 if below else 1.0
    return np.where(least, outside, (1 - q) * q_mass + q * p), np.where(least, outside, q_mass)


def _fixed_scale(s: float, shares: Floats, losses: Floats, below: bool) -> tuple[Floats, Floats]:
    """Pr[loss > l] or Pr[loss ≤ l] under Σ_k shares[k]·Lap(k, 1/s) and under Lap(0, 1/s)."""
    levels = np.arange(len(shares), dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        logs = np.log(shares)
        # On [m, m+1] the loss is log(A_m + e^{2sx} B_m), A_m = Σ_{k≤m} w_k e^{sk}, B_m = Σ_{k>m} w_k e^{−sk}.
        lower = np.logaddexp.accumulate(logs + s * levels)
        upper = np.append(np.logaddexp.accumulate((logs - s * levels)[::-1])[::-1][1:], -np.inf)
        knots = np.logaddexp(lower, upper + 2 * s * levels)
        piece = np.clip(np.searchsorted(knots, losses, side="right") - 1, 0, len(levels) - 2)
        rest = losses + np.log1p(-np.exp(np.minimum(lower[piece] - losses, 0.0)))
        cut = np.clip((rest - upper[piece]) / (2 * s), piece, piece + 1)
        # The half-line beyond the cut, under Lap(0) and under the mixture, whose terms sum to A_m and B_m again.
        null = 0.5 * np.exp(-s * cut)
        left, right = 0.5 * np.exp(lower[piece] - s * cut), 0.5 * np.exp(upper[piece] + s * cut)
    # Shares on one side of the cut, added up from that side's end: at most half of them is subtracted again, so that
    # either tail is as precise as it is small.
    if below:
        p, q = (np.cumsum(shares)[piece] - left) + right, 1 - null
    else:
        p, q = (np.append(np.cumsum(shares[:0:-1])[::-1], 0.0)[piece] - right) + left, null
    inside = (losses >= knots[0]) & (losses < knots[-1])
    outside = np.where((losses < knots[0]) == below, 0.0, 1.0)
    return np.where(inside, p, outside), np.where(inside, q, outside)
