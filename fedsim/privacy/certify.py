"""Bounds on ε or δ of one direction of a composed pair, refined until they meet a tolerance."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsim.privacy.bounds import Bounds
from fedsim.privacy.composition import ComposedTail, Parts, Tilts, best_tilt, choose_tilts, compose, find_window
from fedsim.privacy.dominating_pairs import LossPair
from fedsim.privacy.loss_grid import grid_measures

Pairs = Sequence[tuple[LossPair, int]]
COARSE_CELLS = 1500
MOST_CELLS = 2**20
"""Cells of one event's grid, or of the composed window: some 0.3 GB at most."""
ROUNDS = 6
LOG_NOTHING = -230.0
"""A direction whose log δ is below this is as good as none: its largest loss lies below the ε asked about, say."""


@dataclass(frozen=True)
class Question:
    """ε at a δ, or δ at an ε; one of both is None.

    Attributes:
        epsilon: ε, where δ is asked for.
        delta: δ, where ε is asked for.
        tolerance: Relative distance of the bounds to reach.
        settled: What another direction has already reached: an upper bound at or below this needs no refinement.
        threshold: Where given, refinement also ends once it is clear on which side of it the answer lies.
    """

    epsilon: float | None
    delta: float | None
    tolerance: float
    settled: float = 0.0
    threshold: float = np.nan

    def place(self, answer: float) -> tuple[float, float]:
        """ε and log δ of a point on the curve, whichever of both the answer (ε, or log δ) is."""
        if self.delta is None:
            return float(self.epsilon or 0.0), answer
        return answer, float(np.log(self.delta))

    def about(self, found: Bounds, chernoff: float) -> float:
        """A value to plan by, of ε or of log δ: rather too low than too high, from rough bounds and Chernoff's."""
        if self.delta is None:
            upper = min(np.log(found.upper), chernoff - 5) if found.upper > 0 else chernoff - 5
            return float(max(np.log(found.lower), upper) if found.lower > 0 else upper)
        value = max(found.lower, found.upper / 4)
        return value if 0 < value < np.inf else chernoff

    def answered(self, found: Bounds) -> bool:
        """Whether bounds need no refinement."""
        return _gap(found) <= self.tolerance or found.upper <= self.settled or self.decided(found)

    def decided(self, found: Bounds) -> bool:
        """Whether bounds lie on one side of the threshold."""
        return found.upper <= self.threshold or found.lower > self.threshold

    def refinement(self, found: Bounds) -> float:
        """The factor for the spacing after these bounds: their gap is about proportional to its square."""
        factor = 0.8 * float(np.sqrt(self.tolerance / _gap(found)))
        if self.settled > 0 or np.isfinite(self.threshold):
            factor *= 2  # A rough answer may be enough.
        return min(max(factor, 1 / 32), 0.7)


def _gap(found: Bounds) -> float:
    return found.gap if np.isfinite(found.upper) else 1.0


def certify(pairs: Pairs, question: Question, *, swapped: bool) -> Bounds:
    """Bounds for the loss of P against Q (or of Q against P), each pair taken as often as its count says.

    The grid is refined until the bounds meet the tolerance, or would need more than MOST_CELLS; they are certified in
    either case.
    """
    turns = sum(count for _, count in pairs)
    tail = 1e-7 * (question.delta or 1e-12) / turns
    ranges = [pair.loss_range(tail) for pair, _ in pairs]
    widest = max(high - low for low, high in ranges)
    spacing = widest / COARSE_CELLS
    coarse = _measures(pairs, spacing, tail, swapped)
    tilt, bound = best_tilt(coarse[0], epsilon=question.epsilon, delta=question.delta)
    epsilon, log_delta = question.place(bound)
    if question.delta is None and bound < LOG_NOTHING:
        return Bounds(lower=0.0, upper=min(float(np.exp(bound)) + _infinite(coarse[0]), 1.0))
    best = Bounds(lower=0.0, upper=np.inf if question.epsilon is None else 1.0)
    # The Chernoff bound places the answer some way off: the first tilts are chosen with room for that.
    tilts = choose_tilts(coarse[0], tilt, epsilon, log_delta - 10)
    found: Bounds | None = _bounds(coarse, tilts, epsilon, question) or best
    for _ in range(ROUNDS):
        if found is None:
            break
        best = Bounds(lower=max(best.lower, found.lower), upper=min(best.upper, found.upper))
        if question.answered(best):
            break
        epsilon, log_delta = question.place(question.about(best, bound))
        if question.delta is None:
            # How far the grid must reach for this δ is known only now.
            tail = max(1e-7 * float(np.exp(min(log_delta, 0.0))) / turns, 1e-280)
            coarse = _measures(pairs, widest / COARSE_CELLS, tail, swapped)
            tilt, _ = best_tilt(coarse[0], epsilon=question.epsilon)
        tilts = choose_tilts(coarse[0], tilt, epsilon, log_delta)
        finest = 1.02 * max(widest, find_window(coarse[0], tilts, epsilon).width) / MOST_CELLS
        if spacing < 1.2 * finest:
            break
        spacing = max(spacing * question.refinement(best), finest)
        found = _bounds(_measures(pairs, spacing, tail, swapped), tilts, epsilon, question)
    return best


def _measures(pairs: Pairs, spacing: float, tail: float, swapped: bool) -> tuple[Parts, Parts]:
    built = [(*grid_measures(pair, spacing, tail, swapped=swapped), count) for pair, count in pairs]
    return [(upper, count) for upper, _, count in built], [(lower, count) for _, lower, count in built]


def _bounds(measures: tuple[Parts, Parts], tilts: Tilts, target: float, ask: Question) -> Bounds | None:
    """Bounds from measures above and below; None where the window would not fit."""
    upper, lower = measures
    window = find_window(upper, tilts, target)
    if window.width > MOST_CELLS * upper[0][0].spacing:
        return None
    above, below = compose(upper, window, target), compose(lower, window, target)
    high = above.moved(sum(count * measure.shift for measure, count in upper), above.errors + _infinite(upper))
    low = below.moved(sum(count * measure.shift for measure, count in lower), -below.errors)
    if ask.delta is None:
        at = float(ask.epsilon or 0.0)
        least = max(_interpolate(low, at, certain=False), 0.0)
        return Bounds(lower=least, upper=min(_interpolate(high, at, certain=True), 1.0))
    least = max(_invert(low, ask.delta, certain=False), 0.0)
    return Bounds(lower=least, upper=max(_invert(high, ask.delta, certain=True), 0.0))


def _infinite(parts: Parts) -> float:
    """Probability that the composed loss is infinite."""
    return float(-np.expm1(sum(count * np.log1p(-measure.infinite) for measure, count in parts)))


def _interpolate(tail: ComposedTail, epsilon: float, *, certain: bool) -> float:
    """δ at epsilon: the curve is linear in e^ε between neighbouring losses."""
    if epsilon < tail.losses[0]:
        return 1.0 if certain else float(tail.deltas[0])
    after = int(np.clip(np.searchsorted(tail.losses, epsilon), 1, len(tail.losses) - 1))
    left, right = tail.losses[after - 1], tail.losses[after]
    share = np.expm1(epsilon - left) / np.expm1(right - left)
    return float(tail.deltas[after - 1] * (1 - share) + tail.deltas[after] * share)


def _invert(tail: ComposedTail, delta: float, *, certain: bool) -> float:
    """Where the curve falls to delta for good."""
    over = np.flatnonzero(~(tail.deltas <= delta)) if certain else np.flatnonzero(tail.deltas > delta)
    if len(over) == 0:
        return float(tail.losses[0]) if certain else 0.0
    last = int(over[-1])
    if last + 1 == len(tail.losses):
        return np.inf if certain else float(tail.losses[last])
    top, bottom = tail.deltas[last], tail.deltas[last + 1]
    share = (top - delta) / (top - bottom)
    return float(tail.losses[last] + np.log1p(share * np.expm1(tail.losses[last + 1] - tail.losses[last])))
