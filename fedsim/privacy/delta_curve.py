"""δ at many ε at once: a composition under one tilt bounds the whole curve around a point, so few of them cover it."""

from dataclasses import replace

import numpy as np

from fedsim.privacy.composition import Parts, compose
from fedsim.privacy.grid_plan import MOST_WINDOW, Pairs, Plan, make_plan
from fedsim.privacy.loss_cells import Floats
from fedsim.privacy.tilting import Tilts, choose_tilts, find_window, tilted_deviation

ANCHORS = (0.5, 0.02, 1e-4, 1e-7, 1e-10, 1e-13, 1e-16, 1e-19)
"""δ around which the loss is tilted and composed."""
CLOSE = 2e-3
"""About the relative distance of the bounds."""
CLOSEST = 1e-4
"""The same where δ is large."""
LARGE = 0.01
MOST_CELLS = 2**15
"""Cells of one release's grid: a curve need not cost more than a single answer at its most difficult."""


def delta_curve(pairs: Pairs, epsilons: Floats, least_delta: float) -> tuple[Floats, Floats]:
    """Lower and upper bounds on δ of the worse direction at each ε, float64 of epsilons' shape.

    All are certified, and falling. Relative to δ they are about CLOSE together, CLOSEST where δ is large.

    Args:
        pairs: What is composed, and how often.
        epsilons: ε ≥ 0, rising.
        least_delta: The smallest δ of interest; bounds below it may be far apart.
    """
    lower, upper = _direction(pairs, epsilons, least_delta, swapped=False)
    if all(pair.symmetric for pair, _ in pairs):
        return lower, upper
    other_lower, other_upper = _direction(pairs, epsilons, least_delta, swapped=True)
    return np.maximum(lower, other_lower), np.maximum(upper, other_upper)


def _direction(pairs: Pairs, epsilons: Floats, least_delta: float, *, swapped: bool) -> tuple[Floats, Floats]:
    lower, upper = np.zeros_like(epsilons), np.ones_like(epsilons)
    farthest = replace(make_plan(pairs, delta=least_delta, swapped=swapped), most_cells=MOST_CELLS)
    anchors = [anchor for anchor in ANCHORS if anchor > 1e-2 * least_delta]
    if farthest.aimed(delta=anchors[0]).bound <= 0:
        # Not even at ε = 0 is δ as large.
        start = farthest.aimed(epsilon=0.0)
        anchors = [anchor for anchor in anchors if np.log(anchor) < start.bound - 1]
        lower, upper = _around(start, 0.0, start.guess(of_delta=True), epsilons)
    for anchor in anchors:
        plan = farthest.aimed(delta=anchor)
        found = _around(plan, max(plan.guess(of_delta=False), 0.0), float(np.log(anchor)), epsilons)
        lower, upper = np.maximum(lower, found[0]), np.minimum(upper, found[1])
    # δ falls as ε grows: what bounds it at one place bounds it from there on.
    return np.maximum.accumulate(lower[::-1])[::-1], np.minimum.accumulate(upper)


def _around(plan: Plan, epsilon: float, log_delta: float, epsilons: Floats) -> tuple[Floats, Floats]:
    """Bounds that are close near a point of the curve."""
    tilts = choose_tilts(plan.sketches, plan.tilt, epsilon, log_delta - 3)
    close = CLOSEST if log_delta > np.log(LARGE) else CLOSE
    room = close * min(1 / plan.tilt, tilted_deviation(plan.sketches, plan.tilt))
    above, below = plan.measures(plan.layout(room, tilts, epsilon, blocks=True))
    return _bound(below, tilts, epsilon, epsilons, above=False), _bound(above, tilts, epsilon, epsilons, above=True)


def _bound(parts: Parts, tilts: Tilts, epsilon: float, epsilons: Floats, *, above: bool) -> Floats:
    window = find_window(parts, tilts)
    if window.width > 2 * MOST_WINDOW * parts[0][0].spacing:
        return np.full_like(epsilons, 1.0 if above else 0.0)
    return compose(parts, window, min(epsilon, window.high), above=above).at(epsilons)
