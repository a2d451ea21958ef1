"""Bounds on ε or δ of one direction of a composed pair, refined until they meet a tolerance."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsim.privacy.bounds import Bounds
from fedsim.privacy.composition import ComposedTail, Parts, best_tilt, compose, find_window
from fedsim.privacy.dominating_pairs import LossPair
from fedsim.privacy.loss_grid import grid_measures

Pairs = Sequence[tuple[LossPair, int]]
COARSE_CELLS = 3000
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

    def answered(self, found: Bounds) -> bool:
        """Whether bounds need no refinement."""
        gap = found.gap if np.isfinite(found.upper) else 1.0
        return gap <= self.tolerance or found.upper <= self.settled or self.decided(found)

    def decided(self, found: Bounds) -> bool:
        """Whether bounds lie on one side of the threshold."""
        return found.upper <= self.threshold or found.lower > self.threshold


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
    upper, _ = _measures(pairs, spacing, tail, swapped)
    tilt, bound = best_tilt(upper, epsilon=question.epsilon, delta=question.delta)
    if question.delta is None:
        if bound < LOG_NOTHING:
            return Bounds(lower=0.0, upper=min(float(np.exp(bound)) + _infinite(upper), 1.0))
        tail = max(min(float(np.exp(bound)), 1.0) * 1e-6 / turns, 1e-280)
        scale = 1 / tilt
    else:
        scale = abs(bound)
    # Spreading mass over a step h adds up to h²/6 to the variance of each loss and takes up to h²/2 from it.
    spacing = min(spacing, 0.65 * float(np.sqrt(question.tolerance * scale / (0.33 * turns * tilt))))
    if question.settled > 0 or np.isfinite(question.threshold):
        spacing *= 2.5  # A rough answer may be enough.
    best = Bounds(lower=0.0, upper=np.inf if question.epsilon is None else 1.0)
    for _ in range(ROUNDS):
        spacing = max(spacing, widest / MOST_CELLS)
        found = _bounds(pairs, spacing, tail, tilt, question, swapped)
        if found is None:
            break
        best = Bounds(lower=max(best.lower, found.lower), upper=min(best.upper, found.upper))
        if question.answered(best) or spacing <= widest / MOST_CELLS:
            break
        gap = best.gap if np.isfinite(best.upper) else 1.0
        spacing *= min(max(0.8 * float(np.sqrt(question.tolerance / gap)), 1 / 16), 0.7)
    return best


def _measures(pairs: Pairs, spacing: float, tail: float, swapped: bool) -> tuple[Parts, Parts]:
    built = [(*grid_measures(pair, spacing, tail, swapped=swapped), count) for pair, count in pairs]
    return [(upper, count) for upper, _, count in built], [(lower, count) for _, lower, count in built]


def _bounds(pairs: Pairs, spacing: float, tail: float, tilt: float, ask: Question, swapped: bool) -> Bounds | None:
    """Bounds at one spacing; None where the window would not fit."""
    upper, lower = _measures(pairs, spacing, tail, swapped)
    tilt, bound = best_tilt(upper, epsilon=ask.epsilon, delta=ask.delta, near=tilt)
    target = bound if ask.epsilon is None else ask.epsilon
    window = find_window(upper, tilt, target)
    if window.high - window.low > 2 * MOST_CELLS * spacing:
        return None
    above, below = compose(upper, window, target), compose(lower, window, target)
    infinite = _infinite(upper)
    high = above.moved(sum(count * measure.shift for measure, count in upper), above.errors + infinite)
    low = below.moved(sum(count * measure.shift for measure, count in lower), -below.errors)
    if ask.delta is None:
        at = float(ask.epsilon or 0.0)
        least = max(_interpolate(low, at), 0.0)
        return Bounds(lower=least, upper=min(_interpolate(high, at), 1.0))
    least = max(_invert(low, ask.delta, certain=False), 0.0)
    return Bounds(lower=least, upper=max(_invert(high, ask.delta, certain=True), 0.0))


def _infinite(parts: Parts) -> float:
    """Probability that the composed loss is infinite."""
    return float(-np.expm1(sum(count * np.log1p(-measure.infinite) for measure, count in parts)))


def _interpolate(tail: ComposedTail, epsilon: float) -> float:
    """δ at epsilon: the curve is linear in e^ε between neighbouring losses."""
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
