"""Certified bounds on ε(δ) and δ(ε) of composed events."""

from collections import Counter
from functools import lru_cache

import numpy as np

from fedsim.privacy.bounds import Bounds
from fedsim.privacy.composition import ComposedTail, Parts, best_tilt, compose, find_window
from fedsim.privacy.dominating_pairs import LossPair, dominating_pair
from fedsim.privacy.events import Adjacency, Composed, Event, Repeated
from fedsim.privacy.loss_cells import GridMeasure, dominated_measure, dominating_measure
from fedsim.privacy.mechanisms import vector_laplace  # noqa: F401 - registers its dominating pair
from fedsim.validation import require_at_least, require_between, require_positive

MOST_CELLS = 2**21
LOG_NOTHING = -230.0
"""A direction whose log δ is below this is no worse than what rounding leaves: an ε above its largest loss, say."""


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
        return self._solve(delta=delta, tolerance=tolerance)

    def delta(self, epsilon: float, *, tolerance: float = 1e-3) -> Bounds:
        """Bounds on δ at epsilon."""
        require_at_least("epsilon", epsilon, 0)
        return self._solve(epsilon=epsilon, tolerance=tolerance)

    def _solve(self, *, epsilon: float | None = None, delta: float | None = None, tolerance: float) -> Bounds:
        require_positive("tolerance", tolerance)
        counts = [(event, count) for event, count in sorted(self._counts.items(), key=repr) if count]
        if not counts:
            return Bounds(lower=0.0, upper=0.0)
        pairs = tuple((dominating_pair(event, self.adjacency), count) for event, count in counts)
        directions = [False] if all(pair.symmetric for pair, _ in pairs) else [False, True]
        found = [_Direction(pairs, swapped).solve(epsilon, delta, tolerance) for swapped in directions]
        return Bounds(lower=max(one.lower for one in found), upper=max(one.upper for one in found))


def flatten(event: Event) -> Counter[Event]:
    """The primitive events within an event, and how often each occurs."""
    if isinstance(event, Repeated):
        return Counter({inner: count * event.count for inner, count in flatten(event.event).items()})
    if isinstance(event, Composed):
        return sum((flatten(inner) for inner in event.events), Counter())
    return Counter({event: 1})


class _Direction:
    """One direction of the composed pair: P against Q, or swapped."""

    def __init__(self, pairs: tuple[tuple[LossPair, int], ...], swapped: bool) -> None:
        self.pairs = pairs
        self.swapped = swapped
        self.turns = sum(count for _, count in pairs)

    def solve(self, epsilon: float | None, delta: float | None, tolerance: float) -> Bounds:
        tail = 1e-7 * (delta if delta is not None else 1e-9) / self.turns
        spacing = max(pair.loss_range(tail)[1] - pair.loss_range(tail)[0] for pair, _ in self.pairs) / 2000
        upper = self.measures(spacing, tail)[0]
        tilt, bound = best_tilt(upper, epsilon=epsilon, delta=delta)
        if delta is None:
            if bound < LOG_NOTHING:
                return Bounds(lower=0.0, upper=min(float(np.exp(bound)) + _infinite(upper), 1.0))
            tail = min(np.exp(bound), 1.0) * 1e-6 / self.turns
            wanted = tolerance / (0.33 * self.turns * tilt**2)
        else:
            if bound <= 0:
                return Bounds(lower=0.0, upper=0.0)
            wanted = tolerance * bound / (0.33 * self.turns * tilt)
        best = Bounds(lower=0.0, upper=np.inf)
        spacing = min(spacing, 0.8 * np.sqrt(wanted))
        for _ in range(5):
            found = self.bounds(spacing, tail, epsilon, delta)
            best = Bounds(lower=max(best.lower, found.lower), upper=min(best.upper, found.upper))
            if best.gap <= tolerance:
                break
            spacing *= min(max(0.8 * np.sqrt(tolerance / best.gap), 1 / 16), 0.6)
        return best

    def bounds(self, spacing: float, tail: float, epsilon: float | None, delta: float | None) -> Bounds:
        upper, lower = self.measures(spacing, tail)
        tilt, bound = best_tilt(upper, epsilon=epsilon, delta=delta)
        target = bound if epsilon is None else epsilon
        window = find_window(upper, tilt, target)
        above, below = compose(upper, window, target), compose(lower, window, target)
        infinite = _infinite(upper)
        above_shift = sum(count * measure.shift for measure, count in upper)
        below_shift = sum(count * measure.shift for measure, count in lower)
        high = ComposedTail(above.losses + above_shift, above.deltas + above.errors + infinite, above.errors)
        low = ComposedTail(below.losses + below_shift, below.deltas - below.errors, below.errors)
        if delta is None:
            return Bounds(
                lower=max(_interpolate(low, epsilon), 0.0),  # type: ignore[arg-type]
                upper=min(_interpolate(high, epsilon), float(np.exp(bound)) + infinite, 1.0),  # type: ignore[arg-type]
            )
        least = max(_invert(low, delta, certain=False), 0.0)
        return Bounds(lower=least, upper=max(_invert(high, delta, certain=True), least, 0.0))

    def measures(self, spacing: float, tail: float) -> tuple[Parts, Parts]:
        built = [(_measures(_Key(pair), spacing, tail, self.swapped), count) for pair, count in self.pairs]
        return [(two[0], count) for two, count in built], [(two[1], count) for two, count in built]


class _Key:
    """A pair, hashed by identity."""

    def __init__(self, pair: LossPair) -> None:
        self.pair = pair


@lru_cache(maxsize=1)
def _measures(key: _Key, spacing: float, tail: float, swapped: bool) -> tuple[GridMeasure, GridMeasure]:
    pair = key.pair
    low, high = pair.loss_range(tail)
    origin, bottom = grid_origin(pair, spacing, low)
    cells = pair.cells(origin + spacing * np.arange(np.ceil((high - origin) / spacing) + 1))
    top = 1 + (len(cells.p) - bottom - 1) % 3
    if swapped:
        cells, bottom, top = cells.swapped(), top, bottom
    return dominating_measure(cells), dominated_measure(cells, bottom, top)


def _infinite(parts: Parts) -> float:
    """Probability that the composed loss is infinite."""
    return float(-np.expm1(sum(count * np.log1p(-measure.infinite) for measure, count in parts)))


def grid_origin(pair: LossPair, spacing: float, low: float) -> tuple[float, int]:
    """The first grid point, and how many of the first cells to merge.

    Without sampling the user is absent with probability w, and much of the loss lies just above log w, within less
    than a grid step. The grid is laid so that all of it, merged, falls on a grid point.
    """
    least = pair.least_loss
    if least < low - 2 * spacing:
        return spacing * np.floor(low / spacing), 1
    start, end = 2.0, 20.0
    for _ in range(5):
        cells = pair.cells(least + spacing * np.linspace(start, end, 65))
        merged = np.log(np.cumsum(cells.p[:-1])) - np.log(np.cumsum(cells.q[:-1]))
        reach = (cells.edges - merged) / spacing
        first = int(np.argmax(reach >= 2))
        if reach[first] < 2 or first == 0:
            return least - spacing, 1
        step = (end - start) / 64
        start, end = start + step * (first - 1), start + step * first
    below = int(np.ceil((cells.edges[first] - least) / spacing))
    return float(cells.edges[first] - below * spacing), below + 1


def _interpolate(tail: ComposedTail, epsilon: float) -> float:
    after = int(np.searchsorted(tail.losses, epsilon))
    if after == 0 or after == len(tail.losses):
        return float(tail.deltas[min(after, len(tail.losses) - 1)])
    left, right = tail.losses[after - 1], tail.losses[after]
    share = np.expm1(epsilon - left) / np.expm1(right - left)
    return float(tail.deltas[after - 1] * (1 - share) + tail.deltas[after] * share)


def _invert(tail: ComposedTail, delta: float, *, certain: bool) -> float:
    """Where the curve falls to delta; it is linear in e^ε between neighbouring losses."""
    over = np.flatnonzero(tail.deltas > delta)
    if len(over) == 0:
        return float(tail.losses[0]) if certain else 0.0
    last = int(over[-1])
    if last + 1 == len(tail.losses):
        return np.inf if certain else float(tail.losses[last])
    top, bottom = tail.deltas[last], tail.deltas[last + 1]
    share = (top - delta) / (top - bottom)
    return float(tail.losses[last] + np.log1p(share * np.expm1(tail.losses[last + 1] - tail.losses[last])))
