"""Bounds on ε or δ of one direction of a composed pair, refined until they meet a tolerance.

A Chernoff bound, which is always finite where an ε exists, is what remains where nothing better is found.
"""

from dataclasses import dataclass

import numpy as np

from fedsim.privacy.bounds import Bounds
from fedsim.privacy.composition import Parts, compose
from fedsim.privacy.grid_plan import MOST_WINDOW, Layout, Pairs, make_plan
from fedsim.privacy.tilting import Tilts, chernoff, choose_tilts, find_window

ROUNDS = 8
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

    def about(self, found: Bounds, guess: float) -> float:
        """A value to plan by, of ε or of log δ, from bounds, or while they are far apart from a guess."""
        lower, upper = (
            (found.lower, found.upper) if self.delta is not None else np.log([found.lower + 1e-300, found.upper])
        )
        return float(np.clip(guess, lower, upper)) if found.gap > 0.5 else float(lower)

    def room(self, about: float, tilt: float) -> float:
        """How far ε may be off at a value that was planned by."""
        return self.tolerance * about if self.delta is not None else self.tolerance / tilt

    def answered(self, found: Bounds) -> bool:
        """Whether bounds need no refinement."""
        return found.gap <= self.tolerance or found.upper <= self.settled or self.decided(found)

    def decided(self, found: Bounds) -> bool:
        """Whether bounds lie on one side of the threshold."""
        return found.upper <= self.threshold or found.lower > self.threshold

    def refinement(self, found: Bounds, order: float) -> float:
        """The factor for the spacing after these bounds, whose gap is about proportional to a power of it."""
        factor = 0.8 * (self.tolerance / found.gap) ** (1 / order)
        return float(np.clip(factor, 1 / 32, 0.7))


def certify(pairs: Pairs, question: Question, *, swapped: bool) -> Bounds:
    """Bounds for the loss of P against Q (or of Q against P), each pair taken as often as its count says.

    The grids are refined until the bounds meet the tolerance, or would need more than MOST_CELLS. They are certified
    in either case, and finite unless the probability of an infinite loss reaches δ.
    """
    plan = make_plan(pairs, epsilon=question.epsilon, delta=question.delta, swapped=swapped)
    best = Bounds(lower=0.0, upper=chernoff(plan.sketches, plan.tilt, epsilon=question.epsilon, delta=question.delta))
    if question.answered(best) or (question.delta is None and plan.bound < LOG_NOTHING):
        return best
    guess, order, blocks = plan.guess(of_delta=question.delta is None), 2.0, True
    fineness = 0.5  # A first grid finer than asked for costs less than a second.
    last: tuple[Layout, float, float] | None = None
    for _ in range(ROUNDS):
        about = question.about(best, guess)
        epsilon, log_delta = question.place(about)
        tilts = choose_tilts(plan.sketches, plan.tilt, max(epsilon, 0.0), log_delta - 3)
        if not np.isfinite(find_window(plan.sketches, tilts).width):
            break  # of losses so large that only the Chernoff bound is left
        room = question.room(about, plan.tilt) * fineness**2
        layout = plan.layout(room, tilts, max(epsilon, 0.0), blocks=blocks)
        if last and (layout.spacing, layout.factors) == (last[0].spacing, last[0].factors) and about == last[2]:
            fineness *= 0.7
            continue
        found = _bounds(plan.measures(layout), tilts, max(epsilon, 0.0), question)
        best = Bounds(lower=max(best.lower, found.lower), upper=min(best.upper, found.upper))
        if question.answered(best) or (
            last and last[0].spacing < 1.05 * layout.spacing and found.gap > 0.8 * last[1] and not blocks
        ):
            break
        if last and layout.finest < 0.95 * last[0].finest:
            # Losses with atoms are bounded to first order only, and from below badly by blocks.
            order = float(np.clip(np.log(last[1] / found.gap) / np.log(last[0].finest / layout.finest), 1.0, 2.0))
            blocks = found.gap < last[1] / 2
        last = layout, found.gap, about
        fineness *= question.refinement(best, order)
    return best


def _bounds(measures: tuple[Parts, Parts], tilts: Tilts, target: float, ask: Question) -> Bounds:
    """Bounds from measures above and below."""
    upper, lower = measures
    # Where ε is asked for, the measure below may lie far below the one above.
    included = target if ask.delta is None else None
    window, other = find_window(upper, tilts, included), find_window(lower, tilts, included)
    if max(window.width, other.width) > 2 * MOST_WINDOW * upper[0][0].spacing:
        # ε was guessed far too large: the grid's own Chernoff bound is a better guess.
        return Bounds(lower=0.0, upper=chernoff(upper, tilts.middle, epsilon=ask.epsilon, delta=ask.delta))
    above = compose(upper, window, target, above=True)
    below = compose(lower, other, min(target, other.high), above=False)
    if ask.delta is not None:
        return Bounds(lower=below.inverse(ask.delta), upper=above.inverse(ask.delta))
    at = np.array([ask.epsilon or 0.0])
    return Bounds(lower=float(below.at(at)[0]), upper=float(above.at(at)[0]))
