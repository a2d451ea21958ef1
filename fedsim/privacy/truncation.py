"""Poisson sampling with a cap: how often more units come than may stay, and what each one's chance is then.

N users join independently with probability q; of more than B a uniform subset of B stays. q and B are fixed, whoever
is there. The pair of one round is proved here and relies on no other source: arXiv 2508.15089 has the scheme, and
dp_accounting's `from_truncated_subsampled_gaussian_mechanism` the same τ and q′ with a looser second pair, for one N.

Let s be the number that joins of the N − 1 users other than u. It has the same law with u and without, so whether
s ≥ B is a public coin, of probability τ = Pr[Bin(N − 1, q) ≥ B]. Let γ_v be N(v, σ²I), and all contributions ‖v‖ ≤ 1.

- s < B: nothing is cut, with u or without. Given who else joined, u is there with probability q:
  (1 − q)N(0) + qN(1) against N(0).
- s ≥ B: without u the round holds T, a uniform set of B of the N − 1, whatever s is. With u it holds T, or u in the
  place of a uniform w of T; that with probability qB/(s + 1). T and w tell nothing of s, nor of this choice. So given
  s ≥ B, T and w it happens with probability

      q′ = E[qB/(s + 1) | s ≥ B] = B/(Nτ) · Pr[Bin(N, q) > B],

  and then moves the sum by at most 2: (1 − q′)N(0) + q′N(2) against N(0).

By joint convexity, and since half-spaces are worst for all T and w at once (`gaussian_pairs`), with H_α the
hockey-stick divergence in either direction:

    H_α ≤ (1 − τ)·H_α[(1 − q)N(0) + qN(1), N(0)] + τ·H_α[(1 − q′)N(0) + q′N(2), N(0)]           (N users or N − 1)

which is that of one pair: the coin is seen on both sides. Rounds compose as this pair does. Replacing u keeps N; the
parts are then the plain pair with a user replaced, and that of a cohort of fixed size (`fixed_size_pair`) with γ = q′.

Adding a user to the N that there are is the same with N + 1: τ grows, q′ falls (s grows in the likelihood-ratio
order). Neither N nor N + 1 dominates the other. What dominates both has (1 − q)N(0) + qN(2) against N(0) in the share
of rounds by which the two τ differ: that dominates the first pair, and the second, as q′ < q.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import scipy
from numpy.typing import NDArray

OMITTED = 700.0
"""−log of the probability that a binomial law may have beyond each end of what is summed."""
LEFT_OUT = 2 * float(np.exp(-OMITTED))
STEP_ERROR = 50.0
"""Most that rounding puts into the logarithm of one ratio of neighbouring masses, in units of a float's precision."""


@dataclass(frozen=True)
class Binomial:
    """Bin(trials, probability), between bounds that count all rounding.

    Attributes:
        trials: At least 0.
        probability: Above 0 and at most 1.
    """

    trials: int
    probability: float

    def at_least(self, least: int) -> tuple[float, float]:
        """(lower, upper) bounds on the probability of `least` or more; relative distance below 1e-6 down to 1e-290."""
        if least <= 0 or least > self.trials:
            return float(least <= 0), float(least <= 0)
        return self._between(least, self._last)

    def below(self, least: int) -> tuple[float, float]:
        """The same of less than `least`."""
        if least <= 0 or least > self.trials:
            return float(least > 0), float(least > 0)
        return self._between(self._first, least - 1)

    def _between(self, start: int, end: int) -> tuple[float, float]:
        logs = self._logs[max(start - self._first, 0) : max(end + 1 - self._first, 0)]
        found = float(np.exp(scipy.special.logsumexp(logs))) if len(logs) else 0.0
        doubt = self._doubt * found + LEFT_OUT
        return max(found - doubt, 0.0), min(found + doubt, 1.0)

    def mean_share(self, cap: int) -> float:
        """An upper bound on E[cap/(s + 1) | s ≥ cap], 1 ≤ cap ≤ trials."""
        most = cap / (cap + 1)
        if cap > self._last:
            return most
        places = np.arange(max(cap, self._first), self._last + 1)
        weights = np.exp(self._logs[places - self._first] - self._logs[places - self._first].max())
        # What lies above the sum's end has smaller shares; what lies below its beginning, where cap does, is counted.
        share = float(weights @ (cap / (places + 1.0)) / weights.sum())
        return min(share * (1 + 2 * self._doubt) + LEFT_OUT, most)

    def mean_up_to(self, cap: int) -> float:
        """E[min(s, cap)]; not rounded in any direction."""
        mean, places = self.trials * self.probability, np.arange(self._first, self._last + 1)
        masses = np.exp(self._logs)
        # From the nearer side, so that little cancels.
        if cap < mean:
            return float(cap - masses @ np.maximum(cap - places, 0))
        return float(mean - masses @ np.maximum(places - cap, 0))

    def least_cap(self, chance: float) -> int:
        """The least number that is exceeded with at most this probability, by its upper bound."""
        above = np.cumsum(np.exp(self._logs[::-1]))[::-1] * (1 + self._doubt) + LEFT_OUT
        within = np.flatnonzero(above <= chance)
        return self._first + int(within[0]) - 1 if len(within) else self._last

    @property
    def _first(self) -> int:
        """Where the sums begin: by Bernstein's inequality hardly anything lies below, or beyond `_last`."""
        return max(0, int(np.floor(self.trials * self.probability - self._reach)))

    @property
    def _last(self) -> int:
        return min(self.trials, int(np.ceil(self.trials * self.probability + self._reach)))

    @property
    def _reach(self) -> float:
        variance = self.trials * self.probability * (1 - self.probability)
        return float(OMITTED / 3 + np.sqrt((OMITTED / 3) ** 2 + 2 * OMITTED * variance))

    @cached_property
    def _logs(self) -> NDArray[np.float64]:
        """log-probabilities of _first … _last, from the ratios of neighbours; they sum to 1."""
        places = np.arange(self._first, self._last, dtype=np.float64)
        with np.errstate(divide="ignore"):
            odds = np.log(self.probability) - np.log1p(-self.probability)
        if np.isinf(odds):  # everybody
            return np.append(np.full(len(places), -np.inf), 0.0)
        logs = np.append(0.0, np.cumsum(np.log((self.trials - places) / (places + 1)) + odds))
        normalised: NDArray[np.float64] = logs - scipy.special.logsumexp(logs)
        return normalised

    @cached_property
    def _doubt(self) -> float:
        """A bound on the relative rounding error of a sum of masses."""
        finite = self._logs[np.isfinite(self._logs)]
        return float(4 * len(finite) * np.finfo(float).eps * (STEP_ERROR + np.ptp(finite)))


@dataclass(frozen=True)
class Truncation:
    """What a cap does to a round, each number rounded so that the pair made of them can only be worse.

    Shares of rounds sum to 1, to a float's precision: in `untouched` a user is added to the sum, in `displacing` it
    takes another's place with probability `chance`, and in `doubtful` with probability q. Moving share to a later one
    of (untouched, doubtful) or (displacing, doubtful), and raising `chance`, raises every H_α. The smaller of τ and
    1 − τ keeps its digits.

    Attributes:
        untouched: At most 1 − τ.
        displacing: At most τ.
        doubtful: The rest: where N and N + 1 differ, and rounding.
        chance: At least q′.
    """

    untouched: float
    displacing: float
    doubtful: float
    chance: float


@lru_cache(maxsize=64)
def truncation(population: int, probability: float, cap: int, *, grows: bool) -> Truncation:
    """The shares of rounds for N users and a cap.

    Args:
        population: N.
        probability: q.
        cap: B, at least 1.
        grows: Whether a neighbour may have N + 1 users, as where users are added, or N at most.
    """
    others = Binomial(population - 1, probability)
    largest = Binomial(population, probability) if grows else others
    chance = probability * others.mean_share(min(cap, population - 1)) if population > 1 else probability
    least, most = others.at_least(cap)[0], largest.at_least(cap)[1]
    if least > 1 / 2:
        untouched, seldom = largest.below(cap)[0], others.below(cap)[1]
        displacing, doubtful = 1 - seldom, max(seldom - untouched, 0.0)
    else:
        untouched = float(np.nextafter(1 - most, 0)) if most > 0 else 1.0
        displacing, doubtful = least, max(most - least, 0.0)
    return Truncation(untouched=untouched, displacing=displacing, doubtful=doubtful, chance=min(chance, probability))
