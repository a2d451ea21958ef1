"""What a certified event claims about attacks, and by how much measured rates contradict it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import epsilon_bounds, flatten
from fedsim.privacy.audit.one_run import Guesses, one_run_permits
from fedsim.privacy.audit.rates import AttackRates
from fedsim.privacy.dominating_pairs import dominating_pair
from fedsim.privacy.events import Adjacency, Event
from fedsim.privacy.tradeoff import PrivacyCurve, privacy_curve

ADD_OR_REMOVE = Adjacency.ADD_OR_REMOVE_ONE_USER
CELLS = 4000
LEAST_DELTA = 1e-8
"""Smallest δ of a curve that attacks are held against: rates of fewer than ten million trials tell of none below."""
PERFECT = PrivacyCurve(epsilons=np.zeros(1), upper=np.zeros(1), lower=np.zeros(1))
"""That of what tells nothing."""
MOST_EPSILON = 1e3
"""Where the search ends: an attack without errors is compatible with no finite ε."""


def most_true_positives(event: Event, false_positive: float, adjacency: Adjacency = ADD_OR_REMOVE) -> float:
    """An upper bound on the true-positive rate that the event permits at a false-positive rate.

    One release: the receiver operating characteristic of its dominating pair (Neyman and Pearson). Several: from the
    certified privacy curve (Dong, Roth and Su 2022, Proposition 2.5).
    """
    counts = flatten(event)
    if sum(counts.values()) == 1:
        (primitive,) = (one for one, count in counts.items() if count)
        pair = dominating_pair(primitive, adjacency)
        low, high = pair.loss_range(1e-12)
        cells = pair.cells(np.linspace(low, high, CELLS))
        # Tests that reject where the loss exceeds an edge; between two of them, a test that rejects more gains at most
        # the upper edge's likelihood ratio for each false positive.
        false = np.cumsum((cells.q + cells.q_error)[::-1])[::-1][1:]
        true = np.cumsum((cells.p + cells.p_error)[::-1])[::-1][1:]
        if false_positive < false[-1]:
            return float(true[-1])
        above = int(np.flatnonzero(false <= false_positive)[0])
        return float(min(1.0, true[above] + np.exp(cells.edges[above]) * (false_positive - false[above])))
    return float(1 - curve_of(event, adjacency).tradeoff(np.array([false_positive]))[0])


@lru_cache(maxsize=64)
def curve_of(event: Event, adjacency: Adjacency) -> PrivacyCurve:
    """The certified curve of what attacks are held against, as far down as they can see."""
    return privacy_curve(event, adjacency=adjacency, least_delta=LEAST_DELTA)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A certified guarantee, as one of a family ordered by noise.

    Attributes:
        make_event: The event for a noise multiplier; more noise, more privacy.
        noise_multiplier: The claimed noise.
        delta: δ at which ε is stated.
        adjacency: Which data sets count as neighbours.
    """

    make_event: Callable[[float], Event]
    noise_multiplier: float
    delta: float
    adjacency: Adjacency = ADD_OR_REMOVE

    @property
    def epsilon(self) -> float:
        """The certified ε: an upper bound."""
        return epsilon_bounds(self.make_event(self.noise_multiplier), self.delta, adjacency=self.adjacency).upper

    def contradicted_by(self, rates: AttackRates, noise_multiplier: float | None = None) -> bool:
        """Whether the rates, at their confidence, are impossible for the event at a noise multiplier."""
        event = self.make_event(self.noise_multiplier if noise_multiplier is None else noise_multiplier)
        return rates.true_positive > most_true_positives(event, rates.false_positive, self.adjacency)

    def contradicted_by_guesses(
        self, guesses: Guesses, noise_multiplier: float | None = None, *, confidence: float
    ) -> bool:
        """Whether one run's right guesses are impossible for the event at a noise multiplier."""
        event = self.make_event(self.noise_multiplier if noise_multiplier is None else noise_multiplier)
        return not one_run_permits(guesses, curve_of(event, self.adjacency), confidence=confidence)

    def epsilon_from(self, rates: AttackRates) -> float:
        """A lower bound on ε at delta within the family.

        The rates rule out every event of the family with at least some noise; the bound is the ε of the least noise
        that is ruled out. It rests on the family: see `epsilon_free` for one that rests on nothing.
        """
        if rates.true_positive <= rates.false_positive:
            return 0.0
        return self._epsilon_ruled_out(lambda noise: self.contradicted_by(rates, noise))

    def epsilon_from_guesses(self, guesses: Guesses, *, confidence: float) -> float:
        """A lower bound on ε at delta within the family, from one run's guesses.

        It rests on the shape of the trade-off function alone, however the canaries hang together: see
        `one_run_epsilon` for one that rests on no shape either.
        """
        if one_run_permits(guesses, PERFECT, confidence=confidence):
            return 0.0
        return self._epsilon_ruled_out(
            lambda noise: self.contradicted_by_guesses(guesses, noise, confidence=confidence)
        )

    def _epsilon_ruled_out(self, ruled_out: Callable[[float], bool]) -> float:
        """ε at delta of the least noise that is ruled out, from below."""
        noisy, quiet = self.noise_multiplier, self.noise_multiplier
        while not ruled_out(noisy):
            noisy *= 2
            if noisy > 1e4 * self.noise_multiplier:
                return 0.0
        while ruled_out(quiet):
            noisy, quiet = quiet, quiet / 2
            if quiet < 1e-2 * self.noise_multiplier:
                break
        while noisy / quiet > 1.005:
            middle = math.sqrt(noisy * quiet)
            noisy, quiet = (middle, quiet) if ruled_out(middle) else (noisy, middle)
        return epsilon_bounds(self.make_event(noisy), self.delta, adjacency=self.adjacency).lower


def epsilon_free(rates: AttackRates, delta: float) -> float:
    """The ε that any mechanism with these rates must have at delta (Kairouz, Oh and Viswanath 2015).

    From TPR ≤ e^ε FPR + δ and its mirror image; 0 where the rates say nothing, at most MOST_EPSILON.
    """
    if not 0 <= delta < 1:
        raise InvalidInput("delta", delta, "at least 0 and below 1")
    best = 0.0
    for gained, lost in (
        (rates.true_positive, rates.false_positive),
        (1 - rates.false_positive, 1 - rates.true_positive),
    ):
        if gained - delta > 0:
            best = max(best, MOST_EPSILON if lost == 0 else math.log((gained - delta) / lost))
    return min(best, MOST_EPSILON)
