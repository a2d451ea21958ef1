"""Certified bounds on ε(δ) and δ(ε) of composed events."""

import math
from collections import Counter
from dataclasses import replace
from functools import lru_cache

import numpy as np

from fedsim.privacy.bounds import Bounds
from fedsim.privacy.certify import Question, certify
from fedsim.privacy.dominating_pairs import dominating_pair
from fedsim.privacy.events import Adjacency, Composed, Event, Repeated
from fedsim.privacy.gaussian_curve import composed_shift, gaussian_delta, gaussian_epsilon
from fedsim.privacy.gaussian_pairs import GaussianPair
from fedsim.validation import require_at_least, require_between


def epsilon_bounds(
    event: Event,
    delta: float,
    *,
    adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER,
    tolerance: float = 1e-3,
) -> Bounds:
    """The least ε at which the event is (ε, delta)-differentially private, between certified bounds."""
    accountant = Accountant(adjacency=adjacency)
    accountant.compose(event)
    return accountant.epsilon(delta, tolerance=tolerance)


def delta_bounds(
    event: Event,
    epsilon: float,
    *,
    adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER,
    tolerance: float = 1e-3,
) -> Bounds:
    """The least δ at which the event is (epsilon, δ)-differentially private, between certified bounds."""
    accountant = Accountant(adjacency=adjacency)
    accountant.compose(event)
    return accountant.delta(epsilon, tolerance=tolerance)


class Accountant:
    """Adds events up, and bounds their common (ε, δ).

    Args:
        adjacency: Which data sets count as neighbours.
    """

    def __init__(self, *, adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER) -> None:
        self.adjacency = adjacency
        self._counts: Counter[Event] = Counter()

    def compose(self, event: Event, count: int = 1) -> "Accountant":
        """Add count independent releases of event, whose choice may depend on earlier releases."""
        require_at_least("count", count, 0)
        for primitive, times in flatten(event).items():
            self._counts[primitive] += times * count
        return self

    def epsilon(self, delta: float, *, tolerance: float = 1e-3) -> Bounds:
        """Bounds on ε at delta."""
        require_between("delta", delta, 0, 1)
        bounds = self._solve(delta=delta, tolerance=tolerance)
        # A grid laid out for a δ far above anything the events reach may miss ε = 0, which then suffices.
        if math.isinf(bounds.upper) and self.delta(0.0, tolerance=tolerance).upper <= delta:
            return Bounds(lower=0.0, upper=0.0)
        return bounds

    def delta(self, epsilon: float, *, tolerance: float = 1e-3) -> Bounds:
        """Bounds on δ at epsilon."""
        require_at_least("epsilon", epsilon, 0)
        return self._solve(epsilon=epsilon, tolerance=tolerance)

    def _solve(self, *, epsilon: float | None = None, delta: float | None = None, tolerance: float) -> Bounds:
        require_between("tolerance", tolerance, 0, 1)
        counts = tuple((event, count) for event, count in sorted(self._counts.items(), key=repr) if count)
        return bounds_of(counts, self.adjacency, Question(epsilon, delta, tolerance))


@lru_cache(maxsize=256)
def bounds_of(counts: tuple[tuple[Event, int], ...], adjacency: Adjacency, question: Question) -> Bounds:
    if not counts:
        return Bounds(lower=0.0, upper=0.0)
    pairs = [(dominating_pair(event, adjacency), count) for event, count in counts]
    shifts = [(pair.gaussian_shift, count) for pair, count in pairs if isinstance(pair, GaussianPair)]
    if len(shifts) == len(pairs) and all(np.isfinite(shift) for shift, _ in shifts):
        return _gaussian_bounds(composed_shift(shifts), question)
    bounds = certify(pairs, question, swapped=False)
    if all(pair.symmetric for pair, _ in pairs):
        return bounds
    other = certify(pairs, replace(question, settled=bounds.lower), swapped=True)
    return Bounds(lower=max(bounds.lower, other.lower), upper=max(bounds.upper, other.upper))


def _gaussian_bounds(shift: float, question: Question) -> Bounds:
    if question.delta is not None:
        return gaussian_epsilon(shift, question.delta)
    return gaussian_delta(shift, question.epsilon or 0.0)


def epsilon_against(event: Event, delta: float, threshold: float, *, adjacency: Adjacency, tolerance: float) -> Bounds:
    """Bounds on ε at delta, only as close as it takes to tell on which side of the threshold the upper one lies."""
    require_between("delta", delta, 0, 1)
    require_between("tolerance", tolerance, 0, 1)
    counts = tuple((one, count) for one, count in sorted(flatten(event).items(), key=repr) if count)
    return bounds_of(counts, adjacency, Question(None, delta, tolerance, threshold=threshold))


def flatten(event: Event) -> Counter[Event]:
    """The primitive events within an event, and how often each occurs."""
    if isinstance(event, Repeated):
        return Counter({inner: count * event.count for inner, count in flatten(event.event).items()})
    if isinstance(event, Composed):
        return sum((flatten(inner) for inner in event.events), Counter())
    return Counter({event: 1})
